"""Two evaluations of the same tasks, task by task."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rllib_gtpo.at_k import compute_pass_at_k
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.evaluations.results import Results
from rllib_gtpo.intervals import Interval, compute_bootstrap, sign_flip_p

AVERAGE, MAJORITY = "avg", "maj"
_PASS = re.compile(r"pass@(\d+)")
_SETTINGS_THAT_MATTER = (
    *("seed", "temperature", "top_p", "max_turns", "max_turn_tokens", "max_tokens"),
    *("call_format", "env_config"),
)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A task on which two policies differ."""

    task_id: str
    prompt: str
    ours: float
    theirs: float


@dataclass(frozen=True)
class Comparison:
    """The first policy against the second one, on one split.

    metric: "avg@4", "pass@2", "maj@4".
    ours, theirs: Its means over tasks.
    difference: Of the means, with the interval of the paired bootstrap over tasks.
    p: Of no difference; see `rllib_gtpo.intervals.sign_flip_p`.
    better, worse, equal: On how many tasks the first one is that.
    changed: The tasks that differ, those that differ most first.
    """

    split: str
    metric: str
    ours: float
    theirs: float
    difference: Interval
    p: float
    better: int
    worse: int
    equal: int
    changed: list[Change]

    @property
    def tasks(self) -> int:
        """How many there are."""
        return self.better + self.worse + self.equal

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"tasks": self.tasks, **asdict(self)}


def compare(ours: Results, theirs: Results, metric: str = AVERAGE) -> list[Comparison]:
    """Compares two evaluations, split by split.

    Args:
        ours, theirs: Of the same tasks, with as many samples of each.
        metric: What is compared of a task: "avg", the share of its samples that are correct;
            "pass@K"; or "maj".

    Raises:
        ConfigError: They are not of the same tasks or samples, or have no such metric.
    """
    if ours.samples != theirs.samples:
        raise ConfigError(
            f"{ours.samples} samples of each task cannot be compared with {theirs.samples}: "
            "evaluate both with the same --samples-per-task."
        )
    name, value = metric_of(metric, ours.samples)
    if set(ours.splits) != set(theirs.splits):
        raise ConfigError(
            f"results on {', '.join(ours.splits)} cannot be compared with results on "
            f"{', '.join(theirs.splits)}: evaluate both with the same --split."
        )
    return [_compare(split, _paired(split, ours, theirs), name, value) for split in ours.splits]


def metric_of(metric: str, samples: int) -> tuple[str, Callable[[Row], float]]:
    """Its full name, and its value on a task; ConfigError if so many samples do not have it."""
    found = _PASS.fullmatch(metric)
    if found is None:
        if metric not in (AVERAGE, MAJORITY):
            raise ConfigError(f"metric {metric!r}: use avg, maj, or pass@K, such as pass@4.")
        return f"{metric}@{samples}", lambda row: float(row[metric])
    k = int(found[1])
    if not 1 <= k <= samples:
        raise ConfigError(
            f"pass@{k} needs {k} samples of each task, and there are {samples}: raise "
            "--samples-per-task, or take a smaller K of at least 1."
        )
    return metric, lambda row: compute_pass_at_k(row["samples"], row["correct"], k)


def differing_settings(ours: Results, theirs: Results) -> list[str]:
    """In what the evaluations differ besides the policy, for people."""
    one, other = ours.about.get("settings", {}), theirs.about.get("settings", {})
    return [
        f"{name} is {one.get(name)} and {other.get(name)}"
        for name in _SETTINGS_THAT_MATTER
        if one.get(name) != other.get(name)
    ]


def _paired(split: str, ours: Results, theirs: Results) -> list[tuple[Row, Row]]:
    first = {row["position"]: row for row in ours.of(split)}
    second = {row["position"]: row for row in theirs.of(split)}
    alone = first.keys() ^ second.keys()
    if alone:
        row = {**first, **second}[min(alone)]
        raise ConfigError(
            f"split {split!r}: {len(alone)} tasks, {row['task_id']} for one, are in one of the "
            f"results only (they have {len(first)} and {len(second)} tasks): evaluate both with "
            "the same --tasks and environment."
        )
    for position, row in first.items():
        other = second[position]
        if (row["task_id"], row["prompt"]) != (other["task_id"], other["prompt"]):
            raise ConfigError(
                f"split {split!r}: task {position} is {row['task_id']} ({row['prompt'][:40]!r}) in "
                f"one of the results and {other['task_id']} ({other['prompt'][:40]!r}) in the "
                "other: evaluate both on the same environment and data."
            )
    return [(row, second[position]) for position, row in first.items()]


def _compare(
    split: str, pairs: Sequence[tuple[Row, Row]], metric: str, value: Callable[[Row], float]
) -> Comparison:
    ours, theirs = [value(row) for row, _ in pairs], [value(row) for _, row in pairs]
    gaps = [one - other for one, other in zip(ours, theirs, strict=True)]
    low, high = compute_bootstrap(gaps)
    changed = [
        Change(row["task_id"], row["prompt"], one, other)
        for (row, _), one, other in zip(pairs, ours, theirs, strict=True)
        if one != other
    ]
    return Comparison(
        split=split,
        metric=metric,
        ours=sum(ours) / len(pairs),
        theirs=sum(theirs) / len(pairs),
        difference=Interval(sum(gaps) / len(pairs), low, high),
        p=sign_flip_p(gaps),
        better=sum(gap > 0 for gap in gaps),
        worse=sum(gap < 0 for gap in gaps),
        equal=sum(gap == 0 for gap in gaps),
        changed=sorted(changed, key=lambda change: -abs(change.ours - change.theirs)),
    )
