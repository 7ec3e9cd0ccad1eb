"""What people see of an iteration while it trains."""

from __future__ import annotations

from typing import Any

_PHASES = ("rollout", "update", "sync")


def summary_line(result: dict[str, Any]) -> str:
    """One line an iteration; a second one if there was nothing to learn from."""
    rewards = " ".join(f"{k} {v:+.3f}" for k, v in result.get("reward", {}).items())
    times = " ".join(f"{k} {result['time'][f'{k}_s']:.1f}s" for k in _PHASES)
    line = (
        f"iter {result['training_iteration']:3d}  acc {result['accuracy']:.3f}  reward: {rewards}  "
        f"turns {result['turn']['per_trajectory']:.2f}  "
        f"tool err {result['tool']['error_rate']:.3f} "
        f"invalid {result['tool']['invalid_rate']:.3f}  "
        f"no-signal {result['group']['zero_std_frac']:.2f}  "
        f"kl {result['mismatch']['kl']:.1e}  ent {result['policy']['entropy']:.3f}  "
        f"{result['tokens']['per_s']:.0f} tok/s  {times}"
    )
    evaluation = result.get("evaluation", {})
    if "accuracy" in evaluation:
        line += f"  held-out {evaluation['accuracy']:.3f}"
    return line + _remedy(result["group"])


def _remedy(group: dict[str, float]) -> str:
    """What to do if no group has a signal."""
    if group["zero_std_frac"] < 1:
        return ""
    why = "every advantage is 0: see docs/debugging.md"
    if group["failed_frac"] == 1:
        why = "every rollout failed: try a cold_start, easier tasks or a larger group_size"
    elif group["solved_frac"] == 1:
        why = "every rollout is right: try harder tasks, or stop here"
    return f"\n          nothing to learn from, {why}"
