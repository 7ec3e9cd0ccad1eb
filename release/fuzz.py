"""Soaks what reads a model's text and its code's behaviour: see tests/fuzz/targets.py.

    python release/fuzz.py                       # five minutes over all targets
    python release/fuzz.py --minutes 60          # an hour
    python release/fuzz.py --target calls        # one target
    python release/fuzz.py --json FILE           # also writes the results

A case that breaks a promise is made as small as it goes, printed, and written to tests/fuzz/corpus,
where a test replays it from then on.  The machine should have a core to spare: no case may take
more than a second of processor time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from release.results import Report

try:
    from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings

    from tests.fuzz.targets import SECONDS, TARGETS, Target
except ImportError as missing:
    print(f"cannot run: {missing}; run it in a checkout, with the extra [dev]")
    sys.exit(2)

CORPUS = Path(__file__).parents[1] / "tests" / "fuzz" / "corpus"
THRESHOLDS = {"failures": {"max": 0}}
COLUMNS = {"what": 10, "cases": 9, "seconds": 9, "worst_s": 9, "failures": 9}
TURN_SECONDS = 20.0  # how long a target has before the next one's turn


class Soak:
    """One target's turns and what they found."""

    def __init__(self, name: str, target: Target) -> None:
        self.name, self.target = name, target
        self.cases = 0
        self.seconds = self.worst = 0.0
        self.found: dict[str, str] = {}  # what was wrong, the smallest case

    def turn(self, number: int, seconds: float) -> None:
        """Runs cases of seed `number`, 50 at a time, for `seconds`."""
        end = time.monotonic() + seconds
        began = time.monotonic()
        batch = 0
        while batch == 0 or time.monotonic() < end:
            batch += 1
            self._batch(number * 10_000 + batch)
        self.seconds += time.monotonic() - began

    def _batch(self, number: int) -> None:
        last: list[Any] = []

        @seed(number)
        @settings(
            max_examples=50,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
        )
        @given(self.target.cases)
        def run(case: Any) -> None:
            last[:] = [case]
            self.cases += 1
            began = time.process_time()
            self.target.check(case)
            self.worst = max(self.worst, time.process_time() - began)

        try:
            run()
        except Exception as error:  # `last` is the smallest case: shrinking ends with it
            # What did not fail again has its cause inside.
            error = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
            self._keep(f"{type(error).__name__}: {error}".split("\n", 1)[0][:300], last[0])

    def _keep(self, problem: str, case: Any) -> None:
        if problem in self.found:
            return
        text = json.dumps({"target": self.name, "case": case, "found": problem})
        self.found[problem] = text
        path = CORPUS / f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}.json"
        path.write_text(text + "\n")
        print(f"FOUND by {self.name}: {problem}\n  {text[:500]}\n  {path}", flush=True)


def main() -> int:
    """Takes turns until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--target", choices=TARGETS, action="append", help="may be given again")
    parser.add_argument("--seed", type=int, default=0, help="of the first turn")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    soaks = [Soak(name, TARGETS[name]) for name in args.target or TARGETS]
    end = time.monotonic() + 60 * args.minutes
    number = args.seed
    try:
        while (left := end - time.monotonic()) > 0:
            for soak in soaks:
                soak.turn(number, min(TURN_SECONDS, left / len(soaks)))
            number += 1
    except KeyboardInterrupt:
        print("stopped early")
    report = Report("fuzz", THRESHOLDS, list(range(args.seed, number)))
    for soak in soaks:
        row = {"what": soak.name, "cases": soak.cases, "seconds": soak.seconds}
        report.add({**row, "worst_s": soak.worst, "failures": len(soak.found)}, COLUMNS)
    print(f"no case may take more than {SECONDS:g} s of processor time in this process")
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
