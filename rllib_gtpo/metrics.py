"""What an iteration says about its rollouts, under stable names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rllib_gtpo.types import Group, StopReason, ToolError, Trajectory

_NOT_REPEATED = (
    *("time", "timer", "perf", "pid", "date", "host", "node_ip", "per_s", "wait_s", "overhead"),
    *("restore", "experiment"),
)  # words in their names


def rollout_metrics(
    groups: Sequence[Group], discarded: Sequence[Trajectory] = ()
) -> dict[str, float]:
    """Exact means over all trajectories (or turns, or calls) of `groups`.

    reward/NAME is the mean over trajectories of the component's sum; tool/error_rate is per call,
    tool/invalid_rate per turn.

    Args:
        groups: All that were sampled, also those that are not trained on: without them, accuracy
            would be that of the groups with a contrast.
        discarded: Rollouts that count only in stop/REASON, as shares of everything rolled out:
            something broke in them or in a sibling, or their group was dropped.
    """
    trajectories = [t for g in groups for t in g.trajectories]
    turns = [turn for t in trajectories for turn in t.turns]
    results = [r for turn in turns for r in turn.results]
    invalid = sum(turn.invalid for turn in turns)
    errors = Counter(r.error for r in results)
    solved = [t for t in trajectories if t.correct]
    metrics = {
        "accuracy": _mean(t.correct for t in trajectories),
        "turn/per_trajectory": _ratio(len(turns), len(trajectories)),
        "turn/tokens": _ratio(sum(len(t.token_ids) for t in turns), len(turns)),
        "turn/reward": _mean(t.reward for t in turns),
        "trajectory/tokens": _mean(t.num_tokens for t in trajectories),
        "trajectory/truncated_frac": _mean(t.truncated for t in trajectories),
        "tool/calls_per_trajectory": _ratio(len(results), len(trajectories)),
        "tool/invalid_rate": _ratio(invalid, len(turns)),
        "tool/error_rate": _ratio(
            len(results) - errors[None] - errors[ToolError.INVALID],
            len(results) - errors[ToolError.INVALID],
        ),
        "tool/timeout_rate": _ratio(errors[ToolError.TIMEOUT], len(results)),
        "tool/used_frac": _mean(_used_tool(t) for t in trajectories),
        "tool/used_frac_solved": _mean(_used_tool(t) for t in solved),
        "group/solved_frac": _mean(all(t.correct for t in g.trajectories) for g in groups),
        "group/failed_frac": _mean(not any(t.correct for t in g.trajectories) for g in groups),
    }
    everything = [*trajectories, *discarded]
    reasons = Counter(t.stop_reason for t in everything)
    for reason in StopReason:
        metrics[f"stop/{reason.value}"] = _ratio(reasons[reason], len(everything))
    for name in sorted({name for turn in turns for name in turn.rewards}):
        total = sum(turn.rewards.get(name, 0.0) for turn in turns)
        metrics[f"reward/{name}"] = _ratio(total, len(trajectories))
    return metrics


def fault_metrics(
    groups: Sequence[Group], left_out: Sequence[Trajectory], lost_runners: int
) -> dict[str, float]:
    """How many times each thing broke; none of it is the policy's doing.

    Args:
        groups: The complete ones.
        left_out: All other rollouts.
        lost_runners: Env runners that died, whose groups were sampled again.
    """
    trajectories = [*(t for g in groups for t in g.trajectories), *left_out]
    reasons = Counter(t.stop_reason for t in trajectories)
    errors = Counter(r.error for t in trajectories for turn in t.turns for r in turn.results)
    return {
        "fault/lost_runners": float(lost_runners),
        "fault/tool_crashes": float(errors[ToolError.CRASHED]),
        "fault/env_errors": float(reasons[StopReason.ENV_ERROR]),
        "fault/env_timeouts": float(reasons[StopReason.ENV_TIMEOUT]),
        "fault/engine_errors": float(reasons[StopReason.ENGINE_ERROR]),
    }


def straggler_metrics(dropped: Mapping[int, Sequence[Trajectory]]) -> dict[str, float]:
    """What dropping the slowest groups cost: groups, and tokens that were sampled in vain."""
    lost = [t.num_trained_tokens for members in dropped.values() for t in members]
    return {
        "straggler/dropped_groups": float(len(dropped)),
        "straggler/lost_tokens": float(sum(lost)),
    }


def staleness_metrics(groups: Sequence[Group], current: int) -> dict[str, float]:
    """How many updates behind the newest weights each turn was sampled.

    Args:
        current: The version of the newest weights that a runner knew of; or what a turn says, if
            that is newer.
    """
    trajectories = [t for g in groups for t in g.trajectories]
    spans = [t.weights_versions for t in trajectories if t.turns]
    current = max([current, *(newest for _, newest in spans)])
    behind = [current - turn.weights_version for t in trajectories for turn in t.turns]
    return {
        "weights/staleness_mean": _mean(behind),
        "weights/staleness_max": float(max(behind, default=0)),
        "weights/spanning_frac": _mean(oldest != newest for oldest, newest in spans),
    }


def repeatable(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that a deterministic run repeats to the last bit: those that neither measure time
    nor name the machine or the process."""
    return {
        name: value
        for name, value in metrics.items()
        if not any(word in name.replace("lifetime", "") for word in _NOT_REPEATED)
    }


def nested(metrics: Mapping[str, float]) -> dict[str, Any]:
    """{"a/b": 1} as {"a": {"b": 1}}, the form that result files take."""
    tree: dict[str, Any] = {}
    for name, value in metrics.items():
        *path, last = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def _used_tool(trajectory: Trajectory) -> bool:
    return any(r.error is not ToolError.INVALID for turn in trajectory.turns for r in turn.results)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _mean(values: Any) -> float:
    listed = [float(v) for v in values]
    return _ratio(sum(listed), len(listed))
