"""A run that is killed at random moments and resumed each time, beside one that nobody killed.

How: `rllib train file` trains the quickstart's task for some iterations (in-process engine, one
seed, deterministic=True), with a checkpoint every second iteration.  Then it is started again,
killed with SIGKILL at a moment of a seeded generator, and resumed, until it has been killed often
enough; every second kill comes where a checkpoint is saved.  The two runs are compared number by
number: every metric of every iteration but times, and every recorded token and log-probability.

    python release/killed_runs.py --json release/results/killed_runs.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

sys.path.insert(0, str(Path(__file__).parents[1] / "envs"))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from results import Report

from rllib_gtpo import record
from rllib_gtpo.command.directory import Checkpoint, RunDirectory, RunRecord
from rllib_gtpo.command.stopping import numbers
from rllib_gtpo.metrics import repeatable

THRESHOLDS = {
    "kills": {"min": 10},
    "differing_metrics": {"max": 0},
    "differing_trajectories": {"max": 0},
    "most_lost_iterations": {"max": 2},
}
ROOT = Path(__file__).parents[1]
FREQUENCY = 2  # iterations between checkpoints
COLUMNS = ("token_ids", "logprobs", "learner_logprobs", "reward", "stop_reason")


class Process(Protocol):
    """What is killed: a subprocess, or a fork."""

    pid: int

    def wait(self) -> int:
        """The exit code."""


Start = Callable[[list[str], Path], Process]
"""Starts `rllib` with arguments, its output going to a file."""


def start_program(arguments: list[str], output: Path) -> Process:
    """As a user does, with a Ray of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "envs")])}
    with output.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "rllib_gtpo.cli", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


@dataclass
class Life:
    """One process of a run, from its start to its end."""

    process: Process
    output: Path
    began: float = field(default_factory=time.monotonic)

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def seen(self) -> list[int]:
        """The iterations whose line has been printed."""
        lines = self.text.splitlines()
        return [int(line.split()[1]) for line in lines if line.startswith("iter ")]

    def wait_for(self, count: int, seconds: float = 300.0) -> bool:
        """Whether it prints so many iterations, rather than end."""
        end = time.monotonic() + seconds
        while len(self.seen()) < count:
            if "rllib train file" in self.text:
                return False  # the last line of a run
            assert time.monotonic() < end, self.text
            time.sleep(0.005)
        return True


@dataclass
class Killed:
    """What became of a run that was killed now and then.

    lost: Of each kill, the iterations that had been printed and were not in a checkpoint.
    in_saves: How many kills left a half-made checkpoint.
    """

    lost: list[int] = field(default_factory=list)
    in_saves: int = 0


def run_to_the_end(start: Start, arguments: list[str], run: Path) -> tuple[float, float]:
    """Seconds to the first iteration's end, and of an iteration after it."""
    output = run.with_suffix(".out")
    life = Life(start([*arguments, "--out", str(run)], output), output)
    assert life.wait_for(1), life.text
    first = time.monotonic()
    assert life.process.wait() == 0, life.text
    iterations = len(life.seen())
    return first - life.began, (time.monotonic() - first) / max(iterations - 1, 1)


def kill_and_resume(
    start: Start,
    arguments: list[str],
    run: Path,
    iterations: int,
    kills: int,
    pace: tuple[float, float],
    seed: int = 0,
) -> Killed:
    """Kills a run that often, and lets it end then."""
    draw = random.Random(seed)
    startup, each = pace
    result = Killed()
    for number in range(kills + 1):
        begun = checkpoints(run)
        if not begun and run.exists():  # it begins anew then, as its message says
            run.rename(run.with_name(f"{run.name}-forgotten-{number}"))
        how = ["--resume", str(run)] if begun else ["--out", str(run)]
        output = run.with_name(f"{run.name}-{number}.out")
        life = Life(start([*arguments, *how], output), output)
        if number == kills:
            assert life.process.wait() == 0, life.text
            return result
        done = begun[-1].iteration if begun else 0
        spare = (iterations - done) // FREQUENCY > kills - number
        if number % 2 and spare:  # where a checkpoint is saved
            life.wait_for(FREQUENCY - done % FREQUENCY)
            time.sleep(draw.uniform(0.0, 0.3 * each))
        else:
            end = time.monotonic() + draw.uniform(0.0, startup + (2 * each if spare else 0.0))
            most = 2 * FREQUENCY if spare else 1  # a resumed run has no cold start
            while time.monotonic() < end and len(life.seen()) < most:
                time.sleep(0.005)
        os.kill(life.process.pid, signal.SIGKILL)
        code = life.process.wait()
        assert code == -signal.SIGKILL, (code, life.text)
        saved = checkpoints(run)
        printed = max(life.seen(), default=done)
        result.lost.append(printed - (saved[-1].iteration if saved else 0))
        result.in_saves += bool(list(run.glob("checkpoint_*.tmp-*")))
    raise AssertionError("not reached")


def checkpoints(run: Path) -> list[Checkpoint]:
    """Those from which the run can go on."""
    return RunDirectory(run, RunRecord("", "", "", "")).checkpoints() if run.exists() else []


def rows_of(run: Path) -> list[dict[str, float]]:
    """Of each iteration what should repeat."""
    lines = (run / "result.json").read_text().splitlines()
    return [repeatable(numbers(json.loads(line))) for line in lines]


def differing(one: Path, other: Path) -> tuple[list[str], int]:
    """The metrics that differ in any iteration, and how many recorded trajectories do."""
    metrics = {
        name
        for a, b in zip(rows_of(one), rows_of(other), strict=True)
        for name in a.keys() | b.keys()
        if not _same(a.get(name), b.get(name))
    }
    first, second = (record.load(run, columns=COLUMNS).to_list() for run in (one, other))
    rows = sum(repr(a) != repr(b) for a, b in zip(first, second, strict=True))
    return sorted(metrics), rows


def _same(a: float | None, b: float | None) -> bool:
    return a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    file = ROOT / "tuned_examples" / "gtpo_calculator.py"
    settings = (
        *("cold_start.steps=100", "groups_per_step=8", "deterministic=true", "record=1.0"),
        *("evaluation_interval=5", "evaluation_duration=32", "progress=false"),
    )
    arguments = [
        *("train", "file", str(file), "--stop", f"training_iteration={args.iterations}"),
        *("--checkpoint-freq", str(FREQUENCY)),
        *(part for setting in settings for part in ("--override", setting)),
    ]
    report = Report("killed_runs", THRESHOLDS, [args.seed])
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        pace = run_to_the_end(start_program, arguments, whole)
        result = kill_and_resume(
            start_program, arguments, killed, args.iterations, args.kills, pace, args.seed
        )
        metrics, trajectories = differing(whole, killed)
        print(*metrics, sep="\n")
        report.add(
            {
                "iterations": args.iterations,
                "kills": len(result.lost),
                "kills_in_saves": result.in_saves,
                "most_lost_iterations": max(result.lost),
                "compared_metrics": len(rows_of(whole)[0]),
                "differing_metrics": len(metrics),
                "differing_trajectories": trajectories,
                "startup_s": pace[0],
                "iteration_s": pace[1],
            }
        )
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
