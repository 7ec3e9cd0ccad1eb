"""Does a slow tool hold up anybody?  Throughput with tools that take time, against none.

    python release/rollouts/latency.py              # under ten minutes on two cores
    python release/rollouts/latency.py --full       # five times as many trajectories
    python release/rollouts/latency.py --json FILE --markdown docs/rollouts.md

The real env runner and the in-process engine with the tiny model, which has seen demonstrations of
the task: two calls of a tool, then the answer.  A call takes 10 ms, and one in a hundred 5 s; which
ones do is a function of trajectory and call, so that all runs have the same.  The engine computes
64 rows at a time; 192 trajectories are in flight, so that enough of them are not in a tool.

"lock-step" is what it is compared with, over the same engine and environments: a batch of 192
trajectories in which every turn waits for the slowest tool of all, one batch after another.  "few"
is the env runner with no more trajectories than rows: those in a tool leave rows empty.

per_s counts trajectories, from the 10th to the 90th percentile of their ends; for lock-step all of
them over the whole time.  Time is what the thread of the event loop computed plus what it waited
with nothing to do, so that other load on the machine does not count; on a quiet machine that is the
time of day.  wall_per_s is by the time of day.  Rounds alternate; ratios are medians over rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import selectors
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import ray
import torch

from release.results import Report, markdown, renewed
from release.rollouts.setup import MARKUP, Sum, bench_config, runner_of, uniform
from rllib_gtpo import SFTConfig
from rllib_gtpo.env_runner import GroupJob, GTPOEnvRunner
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.rollout import Rollout
from rllib_gtpo.rollout_stats import RolloutStats, Tally

QUICK_S, SLOW_S, SLOW_SHARE = 0.010, 5.0, 0.01
ROWS, IN_FLIGHT, MEMBERS = 64, 192, 8
THRESHOLDS = {"of_zero_latency": {"min": 0.85}, "times_lock_step": {"min": 3.0}}
SHOWN = {"what": 30, "trajectories": 12, "seconds": 8, "per_s": 8, "wall_per_s": 10}
SHOWN |= {"of_zero": 8, "in_flight": 9}


class Clock:
    """The time that the event loop of this thread computes or waits."""

    waited = 0.0

    @classmethod
    def watch(cls) -> None:
        """From now on."""
        select = selectors.DefaultSelector.select

        def timed(self: Any, timeout: float | None = None) -> Any:
            began = time.perf_counter()
            events = select(self, timeout)
            if timeout is None or timeout > 0:
                cls.waited += time.perf_counter() - began
            return events

        selectors.DefaultSelector.select = timed  # type: ignore[method-assign]

    @classmethod
    def now(cls) -> tuple[float, float]:
        """Seconds by this clock, and by the time of day."""
        return time.thread_time() + cls.waited, time.perf_counter()


def no_latency(name: str, call: int) -> float:
    """A tool that answers at once."""
    return 0.0


def long_tail(name: str, call: int) -> float:
    """A tool that is usually quick."""
    return SLOW_S if uniform(name, call) < SLOW_SHARE else QUICK_S


def make_model(folder: Path) -> None:
    """The tiny model after a short cold start on the task."""
    config = (
        SFTConfig()
        .environment(Sum)
        .language_model(
            tokenizer=build_tokenizer(MARKUP),
            cold_start={"steps": 200, "batch_size": 16, "lr": 4e-3},
        )
        .training(steps_per_iteration=200)
        .reporting(progress=False)
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    algorithm.train()
    algorithm.env_runner.module.model.save_pretrained(folder)
    algorithm.env_runner.codec.tokenizer.save_pretrained(folder)
    algorithm.stop()


def jobs(trajectories: int, start: int = 0) -> list[GroupJob]:
    """Groups of different tasks."""
    return [GroupJob(start + position, MEMBERS, 0) for position in range(trajectories // MEMBERS)]


def free(runner: GTPOEnvRunner, trajectories: int) -> dict[str, float]:
    """The env runner's own way."""
    ends: list[tuple[float, float]] = []

    def ended(tally: Tally) -> None:
        ends.extend([Clock.now()] * (tally.trajectories - len(ends)))

    began = Clock.now()
    out = runner.sample_groups(jobs(trajectories), on_progress=ended)
    low, high = len(ends) // 10, 9 * len(ends) // 10
    own, wall = ((last - first) for first, last in zip(ends[low], ends[high], strict=True))
    return {
        "trajectories": len(ends),
        "seconds": ends[-1][0] - began[0],
        "per_s": (high - low) / own,
        "wall_per_s": (high - low) / wall,
        "in_flight": out.stats.in_flight_peak,
        "turns": out.stats.turns / len(ends),
        "wait_s": out.stats.straggler_wait_s,
    }


async def one_batch(runner: GTPOEnvRunner, batch: Sequence[GroupJob]) -> int:
    """Every turn waits for all."""
    stats = RolloutStats()
    made = [runner.new_rollout(job, m, 0, stats) for job in batch for m in range(job.members)]
    rollouts = [rollout for rollout in made if isinstance(rollout, Rollout)]
    for rollout in rollouts:
        rollout.open()
    while not all(rollout.done for rollout in rollouts):
        completions = await asyncio.gather(*(rollout.sample() for rollout in rollouts))
        pairs = zip(rollouts, completions, strict=True)
        await asyncio.gather(*(r.take(completion) for r, completion in pairs if completion))
    for rollout in rollouts:
        rollout.close()
    return len(rollouts)


def lock_step(runner: GTPOEnvRunner, batches: int) -> dict[str, float]:
    """One batch after another."""
    began, done = Clock.now(), 0
    for number in range(batches):
        batch = jobs(IN_FLIGHT, start=number * IN_FLIGHT // MEMBERS)
        done += asyncio.run(one_batch(runner, batch))
    own, wall = (last - first for first, last in zip(began, Clock.now(), strict=True))
    return {
        "trajectories": done,
        "seconds": own,
        "per_s": done / own,
        "wall_per_s": done / wall,
        "in_flight": IN_FLIGHT,
    }


def measure(report: Report, model: Path, trajectories: int, rounds: int) -> None:
    """Round by round, each arm once."""
    runners = {}
    for concurrency in (ROWS, IN_FLIGHT):
        config = bench_config(max_concurrency=concurrency, engine_config={"max_batch": ROWS})
        runners[concurrency] = runner_of(config.language_model(model=str(model), tokenizer=None))
    names = ("no latency", "long tail", "long tail, few in flight", "long tail, lock-step")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    free(runners[IN_FLIGHT], 2 * IN_FLIGHT)  # warms up
    for _ in range(rounds):
        Sum.latency = staticmethod(no_latency)
        runs[names[0]].append(free(runners[IN_FLIGHT], trajectories))
        Sum.latency = staticmethod(long_tail)
        runs[names[1]].append(free(runners[IN_FLIGHT], trajectories))
        runs[names[2]].append(free(runners[ROWS], trajectories // 2))
        runs[names[3]].append(lock_step(runners[IN_FLIGHT], 4))
    for runner in runners.values():
        runner.stop()
    zero = runs[names[0]]
    for name in names:
        pairs = zip(runs[name], zero, strict=True)
        shares = [run["per_s"] / other["per_s"] for run, other in pairs]
        row: dict[str, Any] = {
            key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]
        }
        row |= {"what": name, "of_zero": statistics.median(shares), "of_zero_rounds": shares}
        if name == names[1]:
            row["of_zero_latency"] = row["of_zero"]
            row["times_lock_step"] = statistics.median(
                run["per_s"] / other["per_s"]
                for run, other in zip(runs[name], runs[names[3]], strict=True)
            )
        report.add(row, SHOWN)
    print(f"times lock-step: {report.rows[1]['times_lock_step']:.1f}")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    head = ["tool, runner", "in flight", "trajectories a second", "of no latency"]
    body = [
        [row["what"], f"{row['in_flight']:.0f}", f"{row['per_s']:.1f}", f"{row['of_zero']:.2f}"]
        for row in rows
    ]
    return markdown(head, body)


def main() -> int:
    """Measures everything and checks the thresholds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="five times as many trajectories")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table in FILE")
    args = parser.parse_args()
    report = Report("rollouts with slow tools", THRESHOLDS, [0])
    torch.set_num_threads(1)  # the engine computes in the thread that is timed
    Clock.watch()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder))
            measure(report, Path(folder), 15_000 if args.full else 3_000, 3)
    finally:
        ray.shutdown()
    if args.markdown:
        shown = {"rollouts with slow tools": table(report.rows)}
        args.markdown.write_text(renewed(args.markdown.read_text(), shown))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
