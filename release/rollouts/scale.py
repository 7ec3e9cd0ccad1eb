"""The env runner with thousands of trajectories: memory, tasks, time per turn, and growth.

    python release/rollouts/scale.py                # 10,000 trajectories, 2,000 in flight
    python release/rollouts/scale.py --full         # 100,000 trajectories
    python release/rollouts/scale.py --json FILE --plot FILE.png --markdown docs/rollouts.md

The engine is scripted and answers at once, and the tool is asynchronous and adds two numbers, so
that all time is the runner's, the environment's and the event loop's.  Each trajectory has five
turns, four of which call the tool.  Finished groups are counted and let go, as a learner that takes
them at once would.

    turn_ms      CPU time of the whole process for each turn
    overhead_ms  of that, what the metric `rollout/overhead_per_turn_ms` says: connectors, episode,
                 callbacks
    mb_per_1000  growth of resident memory with each 1,000 trajectories, in the second half
    kept_mb_per_1000  the same where all episodes are kept: what a leak of them would look like
    exponent     of a power law through the times of 1,000, 2,000, 5,000 and 10,000 trajectories
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import threading
import time
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from release.results import Report, markdown, renewed
from release.rollouts.setup import ScriptedEngine, Sum, bench_config, runner_of
from rllib_gtpo import group_rollout
from rllib_gtpo.aio import run_coroutine
from rllib_gtpo.env_runner import GroupJob, GTPOEnvRunner

SIZES = (1_000, 2_000, 5_000, 10_000)
IN_FLIGHT, MEMBERS, TURNS = 2_000, 8, 5
THRESHOLDS = {
    "turn_ms": {"max": 1.0},
    "overhead_ms": {"max": 0.5},
    "mb_per_1000": {"max": 0.5},
    "kept_mb_per_1000": {"min": 5.0},
    "in_flight_peak": {"min": IN_FLIGHT, "max": IN_FLIGHT},
    "tasks_left": {"max": 0},
    "environments_left": {"max": 0},
    "threads_more": {"max": 0},
    "exponent": {"min": 0.85, "max": 1.15},
}
SHOWN = {"what": 24, "seconds": 9, "turn_ms": 8, "overhead_ms": 12, "mb_per_1000": 12}
SHOWN |= {"in_flight_peak": 15, "tasks_left": 11, "environments_left": 18, "threads_more": 13}


def resident_mb() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def roll_out(runner: GTPOEnvRunner, trajectories: int, *, keep: bool = False) -> dict[str, Any]:
    """So many trajectories in one call; its figures."""
    jobs = [GroupJob(position, MEMBERS, 0) for position in range(trajectories // MEMBERS)]
    memory: list[tuple[int, float]] = []
    kept: list[Any] = []
    tasks_left: list[int] = []
    done, every = 0, max(MEMBERS, trajectories // 50)

    def take(episodes: Sequence[Any]) -> None:
        nonlocal done
        done += len(episodes)
        if keep:
            kept.extend(episodes)
        if done % every < MEMBERS:
            memory.append((done, resident_mb()))

    def counted(coroutine: Coroutine[Any, Any, Any]) -> Any:
        async def main() -> None:
            await coroutine
            tasks_left.append(len(asyncio.all_tasks()) - 1)

        return run_coroutine(main())

    group_rollout.run_coroutine = counted
    threads = threading.active_count()
    gc.collect()
    began, cpu = time.perf_counter(), time.process_time()
    out = runner.sample_groups(jobs, on_group=take)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert done == trajectories and out.stats.turns == trajectories * TURNS
    counts, sizes = np.array([m for m in memory if m[0] > trajectories / 2]).T
    metrics = out.stats.metrics()
    return {
        "trajectories": trajectories,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "turn_ms": 1000 * cpu / out.stats.turns,
        "overhead_ms": metrics["rollout/overhead_per_turn_ms"],
        "mb_per_1000": 1000 * float(np.polyfit(counts, sizes, 1)[0]),
        "in_flight_peak": int(metrics["rollout/in_flight_peak"]),
        "tasks_left": tasks_left[0],
        "environments_left": Sum.open,
        "threads_more": threading.active_count() - threads,
    }


def measure(report: Report, sizes: Sequence[int], rounds: int) -> None:
    """Each size, round by round so that other load meets all alike; then the one with a leak."""
    config = bench_config(max_concurrency=IN_FLIGHT)
    config.make_engine = lambda codec, module: ScriptedEngine(codec, TURNS)
    runner = runner_of(config)
    roll_out(runner, max(IN_FLIGHT, 2 * MEMBERS))  # warms up
    runs: dict[int, list[dict[str, Any]]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            runs[size].append(roll_out(runner, size))
    best = {size: min(runs[size], key=lambda run: run["cpu_seconds"]) for size in sizes}
    for size, run in best.items():
        row = {"what": f"{size} trajectories", **run}
        if size < max(sizes):  # memory and concurrency are judged where there is enough of both
            for name in ("mb_per_1000", "in_flight_peak"):
                row[f"{name}_here"] = row.pop(name)
        report.add(row, SHOWN)
    kept = roll_out(runner, max(sizes), keep=True)
    row = {"what": "all episodes kept", "kept_mb_per_1000": kept["mb_per_1000"]}
    report.add(row, {"what": 24, "kept_mb_per_1000": 17})
    cpu = [best[size]["cpu_seconds"] for size in sizes]
    exponent = float(np.polyfit(np.log(sizes), np.log(cpu), 1)[0])
    report.add({"what": "growth of time", "exponent": exponent}, {"what": 24, "exponent": 9})
    runner.stop()


def plot(rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Time over trajectories, and the line through them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = [(r["trajectories"], r["cpu_seconds"]) for r in rows if "trajectories" in r]
    sizes, seconds = np.array(points).T
    slope = float((sizes @ seconds) / (sizes @ sizes))
    figure, axis = plt.subplots(figsize=(4.6, 3.6))
    axis.plot(sizes, slope * sizes, "--", color="grey", label=f"{1000 * slope:.2f} ms a trajectory")
    axis.plot(sizes, seconds, "o")
    axis.set(xlabel=f"trajectories of {TURNS} turns", ylabel="CPU seconds")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the docs."""
    head = ["trajectories", "CPU seconds", "ms for a turn", "of that connectors and episode"]
    names = ("trajectories", "cpu_seconds", "turn_ms", "overhead_ms")
    body = [[f"{row[name]:.3g}" for name in names] for row in rows if "trajectories" in row]
    for cells, row in zip(body, rows, strict=False):
        cells[0] = f"{row['trajectories']:,}"
    return markdown(head, body)


def main() -> int:
    """Measures everything and checks the thresholds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="100,000 trajectories")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="renew the table in FILE")
    args = parser.parse_args()
    report = Report("rollouts at scale", THRESHOLDS, [0])
    measure(report, (*SIZES, 100_000) if args.full else SIZES, 1 if args.full else 2)
    if args.plot:
        plot(report.rows, args.plot)
    if args.markdown:
        shown = {"rollouts at scale": table(report.rows)}
        args.markdown.write_text(renewed(args.markdown.read_text(), shown))
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
