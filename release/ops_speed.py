"""How fast is turn credit: a million turns in 10,000 groups, on one core, against plain loops.

    python release/ops_speed.py                    # every estimator and mode, under a minute
    python release/ops_speed.py --update           # also its share of an update of the quickstart
    python release/ops_speed.py --full             # also the default's loops over all groups
    python release/ops_speed.py --json FILE        # also writes the results

The loops are the tests' own reference, one call per group: quadratic in a group's turns and linear
in groups, so that their time on all groups is that of a sample times the number of groups; --full
measures it.  Estimators that look over the whole step ("batch", reinforce_pp) would be quadratic in
all turns; they are timed as if each group were a step, which is to the loops' advantage.

Times are processor time, since other processes disturb it less than the clock's.  Each round times
everything once, and "ratio" is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import torch
from results import Report

from rllib_gtpo.ops.advantages import ESTIMATORS, turn_advantages

EXAMPLE = Path(__file__).parents[1] / "tuned_examples" / "gtpo_calculator.py"
THRESHOLDS = {"ratio": {"min": 100.0}}
UPDATE_THRESHOLDS = {"credit_share": {"max": 0.01}}
COLUMNS = {"what": 30, "loops_s": 8, "fast_s": 8, "ratio": 8}
GROUPS, MEMBERS, MOST_TURNS = 10_000, 8, 24  # 12.5 turns on average: a million in all
SAMPLE, ROUNDS = 8, 5
ALWAYS = ("rewards", "trajectory", "group")
Columns = dict[str, torch.Tensor]


def variants() -> dict[str, dict[str, Any]]:
    """Every estimator and every mode of the default one, by name."""
    gtpo = ESTIMATORS["gtpo"]
    modes = gtpo.choices["normalize"]
    unweighted = [m for m, o in gtpo.no_effect["normalize"].items() if "weight_trajectories" in o]
    return {
        **{f"gtpo {m}": {"normalize": m} for m in modes},
        **{
            f"gtpo {m}, weighted": {"normalize": m, "weight_trajectories": True}
            for m in modes
            if m not in unweighted
        },
        **{name: {"estimator": name} for name in ESTIMATORS if name != "gtpo"},
    }


def build_columns() -> Columns:
    """Ragged trajectories; outcomes are drawn per trajectory, anchors from 20 states."""
    generator = torch.Generator().manual_seed(0)
    count = GROUPS * MEMBERS
    lengths = torch.randint(1, MOST_TURNS + 1, (count,), generator=generator)
    trajectory = torch.arange(count).repeat_interleave(lengths)
    outcome = torch.rand(count, generator=generator, dtype=torch.float64)[trajectory]
    rewards = torch.rand(len(trajectory), generator=generator, dtype=torch.float64)
    anchor = torch.randint(0, 20, (len(trajectory),), generator=generator)
    return {
        "rewards": rewards,
        "trajectory": trajectory,
        "group": trajectory // MEMBERS,
        "outcome": outcome,
        "anchor": anchor,
    }


def group_lists(columns: Columns, groups: list[int]) -> list[dict[str, list[Any]]]:
    """What the loops are given: the columns of each group as lists."""
    end = torch.bincount(columns["group"]).cumsum(0).tolist()
    rows = [slice(end[g - 1] if g else 0, end[g]) for g in groups]
    return [{name: column[r].tolist() for name, column in columns.items()} for r in rows]


def loops(options: dict[str, Any], group: dict[str, list[Any]]) -> list[float]:
    """The reference's advantages of one group."""
    from tests.ops import reference

    rest = dict(options)
    name = rest.pop("estimator", "gtpo")
    rest |= {needed: group[needed] for needed in ESTIMATORS[name].inputs}
    return reference.ESTIMATORS[name](group["rewards"], group["trajectory"], group["group"], **rest)


def check_agreement(options: dict[str, Any], group: dict[str, list[Any]]) -> None:
    """Both compute the same, or their times cannot be compared."""
    kinds = {"rewards": torch.float64, "outcome": torch.float64}
    columns = {name: torch.tensor(v, dtype=kinds.get(name)) for name, v in group.items()}
    got, expected = turn_advantages(**columns, **options), loops(options, group)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=1e-9)


def seconds(function: Any) -> float:
    """Processor time of one call."""
    began = time.process_time()
    function()
    return time.process_time() - began


def compare(report: Report, columns: Columns) -> None:
    """A row for every variant, from rounds that each time all of them."""
    every = torch.linspace(0, GROUPS - 1, SAMPLE).long().tolist()
    sample = group_lists(columns, every)
    fast: dict[str, list[float]] = {name: [] for name in variants()}
    slow: dict[str, list[float]] = {name: [] for name in variants()}
    for number in range(ROUNDS):
        for name, options in variants().items():
            inputs = ESTIMATORS[options.get("estimator", "gtpo")].inputs
            needed = {n: c for n, c in columns.items() if n in (*ALWAYS, *inputs)}
            if number == 0:
                check_agreement(options, sample[0])
                turn_advantages(**needed, **options)  # first calls allocate
            fast[name].append(seconds(lambda o=options, n=needed: turn_advantages(**n, **o)))
            taken = seconds(lambda o=options: [loops(o, group) for group in sample])
            slow[name].append(taken / SAMPLE * GROUPS)
    for name in variants():
        ratios = [s / f for s, f in zip(slow[name], fast[name], strict=True)]
        row = {"what": name, "loops_s": median(slow[name]), "fast_s": median(fast[name])}
        report.add({**row, "ratio": median(ratios)}, COLUMNS)


def whole_default(columns: Columns) -> dict[str, Any]:
    """The default estimator's loops over all groups, compared in every value."""
    groups = group_lists(columns, list(range(GROUPS)))
    expected: list[float] = []
    slow_s = seconds(lambda: [expected.extend(loops({}, group)) for group in groups])
    needed = {name: columns[name] for name in ALWAYS}
    fast_s = median(seconds(lambda: turn_advantages(**needed)) for _ in range(ROUNDS))
    got = turn_advantages(**needed)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=0, atol=1e-9)
    row = {"what": "gtpo group, over all groups", "loops_s": slow_s, "fast_s": fast_s}
    return {**row, "ratio": slow_s / fast_s}


def update_share(iterations: int = 3) -> dict[str, Any]:
    """Update time and turn credit's part of it, over some iterations after a short cold start."""
    import ray

    from rllib_gtpo.command.files import load_experiment
    from rllib_gtpo.command.quiet import silence
    from rllib_gtpo.connectors import learner

    silence()
    ray.init(num_cpus=2, include_dashboard=False, logging_level="ERROR", ignore_reinit_error=True)
    config = load_experiment(EXAMPLE).config.copy(copy_frozen=False)
    config.cold_start = {**config.cold_start, "steps": 200}
    config.evaluation(evaluation_interval=None).reporting(progress=False)
    spent: list[float] = []
    credit = learner.turn_credit

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return credit(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - began)

    learner.turn_credit = timed  # the learner is in this process
    try:
        algorithm = config.build_algo()
        updates = [algorithm.train()["time"]["update_s"] for _ in range(iterations)]
        algorithm.stop()
    finally:
        learner.turn_credit = credit
        ray.shutdown()
    assert len(spent) >= iterations
    update_s, credit_s = sum(updates) / iterations, sum(spent) / iterations
    return {
        "what": "update of the quickstart",
        "update_s": update_s,
        "credit_s": credit_s,
        "credit_share": credit_s / update_s,
    }


def main() -> int:
    """Times what was asked for and checks the thresholds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the loops over all groups once, too")
    parser.add_argument("--update", action="store_true", help="3 iterations of the quickstart, too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    try:
        from tests.ops import reference  # noqa: F401
    except ImportError as error:
        print(f"cannot run: {error}; run it in a checkout, where tests/ is beside release/")
        return 2
    report = Report("ops_speed", THRESHOLDS | (UPDATE_THRESHOLDS if args.update else {}), [0])
    if args.update:
        try:
            row = update_share()
        except Exception as error:
            print(f"cannot run the quickstart: {error}")
            return 2
        report.add(row, {name: COLUMNS.get(name, 12) for name in row})
    torch.set_num_threads(1)
    columns = build_columns()
    print(f"{len(columns['rewards'])} turns in {GROUPS} groups, {ROUNDS} rounds", flush=True)
    compare(report, columns)
    if args.full:
        report.add(whole_default(columns), COLUMNS)
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
