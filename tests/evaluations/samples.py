"""Results that no policy had, for pages and tests."""

from __future__ import annotations

from pathlib import Path

from rllib_gtpo.evaluations.results import DIRECTORY, Results, task_rows
from rllib_gtpo.record.location import Location
from rllib_gtpo.types import Group, StopReason, Trajectory, Turn

CORRECT = {"checkpoint_000010": [0, 1, 2, 2, 4, 3], "checkpoint_000020": [1, 3, 4, 2, 4, 4]}


def write_results(run: Path) -> None:
    """Two evaluations of a run, 4 samples of each of 6 tasks."""
    for name, counts in CORRECT.items():
        groups = [group(position, count) for position, count in enumerate(counts)]
        prompts = {position: f"{position}+{position}" for position in range(len(counts))}
        about = {"source": f"{run.name}/{name}", "splits": ["test"], "settings": {}}
        rows = task_rows("test", groups, prompts, lambda a, b, task: a == b)
        Results(about, rows).write(Location.of(run / DIRECTORY), f"{name}-test")


def group(position: int, correct: int) -> Group:
    """Four rollouts of a task, the first ones correct."""
    task = {"id": f"test-{position}", "answer": str(2 * position)}
    members = [
        Trajectory(
            task,
            turns=[Turn(0, token_ids=[1, 2, 3])],
            stop_reason=StopReason.ANSWER,
            answer=task["answer"] if member < correct else "none",
            correct=member < correct,
        )
        for member in range(4)
    ]
    return Group(position, task, members)
