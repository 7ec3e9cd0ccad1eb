"""Learning curves: of the results, with intervals where something is known about the spread."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ITERATION = "training_iteration"
_Z = 1.96  # of a 95% interval
_SHOWN = {
    "evaluation/accuracy": "Held-out accuracy",
    "accuracy": "Accuracy in training",
    "reward": "Reward of a trajectory",
    "turn/per_trajectory": "Turns of a trajectory",
    "group/zero_std_frac": "Groups without a signal",
    "tool/error_rate": "Tool errors per call",
    "tool/invalid_rate": "Invalid calls per turn",
    "trajectory/truncated_frac": "Trajectories cut off",
    "policy/entropy": "Entropy of the policy",
    "mismatch/kl": "KL of sampler and learner",
    "clip/high_frac": "Tokens clipped above",
    "grad/norm": "Gradient norm",
    "tokens/per_s": "Tokens a second",
    "env_runners/episode_return_mean": "Return of an episode",
}
_OF_GROUPS = ("accuracy", "reward", "turn/per_trajectory")  # what `group_values` knows


def group_values(group: Mapping[str, Any]) -> dict[str, float]:
    """A group's means of what the curves show with an interval."""
    members = group["trajectories"]
    return {
        "accuracy": _mean(float(t["correct"]) for t in members),
        "reward": _mean(t["reward"] for t in members),
        "turn/per_trajectory": _mean(float(len(t["turns"])) for t in members),
    }


def learning_curves(
    results: Sequence[Mapping[str, float]],
    by_iteration: Mapping[int, tuple[int, Sequence[Mapping[str, float]]]],
) -> list[dict[str, Any]]:
    """The curves that there is anything for: {"name", "title", "points": [[x, y, low, high]]}.

    The interval is that of a mean over an iteration's groups (members of one are not independent):
    the spread of the recorded groups, over the root of the number of all that were sampled.  An
    evaluation has one of its own, see rllib_gtpo.at_k.

    Args:
        results: The numbers of each iteration.
        by_iteration: Iteration -> how many groups it sampled, and `group_values` of recorded ones.
    """
    curves = []
    shown = dict(_SHOWN)
    if any("accuracy" in row for row in results):
        del shown["env_runners/episode_return_mean"]  # the reward, under RLlib's name
    for name, title in shown.items():
        points = dict(_reported(results, name))
        for x, (sampled, groups) in by_iteration.items():
            values = [group[name] for group in groups if name in group]
            if values:
                y = points.get(x, _mean(values))
                points[x] = y
                if len(values) > 1:
                    half = _Z * _deviation(values) / math.sqrt(max(sampled, len(values)))
                    points[x] = (y, y - half, y + half)
        rows = [[x, *(y if isinstance(y, tuple) else (y, None, None))] for x, y in points.items()]
        if rows:
            curves.append({"name": name, "title": title, "points": sorted(rows)})
    return curves


def _reported(results: Sequence[Mapping[str, float]], name: str) -> Iterable[tuple[int, Any]]:
    for row in results:
        if name == "reward":
            parts = [value for key, value in row.items() if key.startswith("reward/")]
            value = sum(parts) if parts else None
        else:
            value = row.get(name)
        if value is not None and math.isfinite(value) and ITERATION in row:
            yield int(row[ITERATION]), _with_interval(row, name, value)


def _with_interval(row: Mapping[str, float], name: str, value: float) -> Any:
    """Evaluation has computed its interval: that of avg@k, which is the accuracy."""
    averages = [key for key in row if re.fullmatch(r"evaluation/avg@\d+", key)]
    if name != "evaluation/accuracy" or not averages:
        return value
    return value, row[f"{averages[0]}_low"], row[f"{averages[0]}_high"]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else 0.0


def _deviation(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
