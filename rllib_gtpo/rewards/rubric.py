"""The reward of a turn: named components, kept apart from the environment to the report.

Sections 2 and 3 of the algorithm's description: accuracy on the last turn, a small penalty for a
turn with an invalid call, the same on a first turn without any call, and never a positive reward
for mere tool use.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rllib_gtpo.errors import RewardError
from rllib_gtpo.types import Group, ToolError, Trajectory, Turn

if TYPE_CHECKING:
    from rllib_gtpo.env import ToolEnv


@dataclass(frozen=True)
class Rubric:
    """Which components a turn gets besides the environment's own.

    format_penalty: subtracted (once) from a turn with any invalid call, and from a first turn
        without a call where the environment has tools.  0 switches the component off.
    penalize_tool_errors: subtracted (once) from a turn with a well-formed call that raised or timed
        out.
    """

    format_penalty: float = 0.1
    penalize_tool_errors: float = 0.0

    async def score_turn(self, env: ToolEnv, trajectory: Trajectory, turn: Turn) -> None:
        """Adds the components of one turn; call it once, when the turn's tools have answered."""
        rewards: dict[str, float] = {}
        if self.format_penalty and env.has_tools:
            skipped_tools = turn.index == 0 and not turn.calls
            rewards["format"] = -self.format_penalty if turn.invalid or skipped_tools else 0.0
        if self.penalize_tool_errors:
            failed = any(r.error not in (None, ToolError.INVALID) for r in turn.results)
            rewards["tool_errors"] = -self.penalize_tool_errors if failed else 0.0
        own = await _awaited(env.turn_reward(turn, trajectory.task))
        merge_components(rewards, own, "turn_reward")
        merge_components(turn.rewards, rewards, "turn_reward")

    async def score_end(self, env: ToolEnv, trajectory: Trajectory) -> None:
        """Adds the outcome's components to the last turn; call it once, when the trajectory
        ended."""
        if trajectory.turns:
            components = await _awaited(env.reward(trajectory, trajectory.task))
            merge_components(trajectory.turns[-1].rewards, components, "reward")
        trajectory.correct = bool(trajectory.turns) and env.correct(trajectory, trajectory.task)

    async def score_group(self, env: ToolEnv, group: Group) -> None:
        """Adds components that depend on the whole group to the last turns of its members."""
        per_member = await _awaited(env.group_reward(group))
        if per_member is None:
            return
        if len(per_member) != len(group.trajectories):
            raise RewardError(
                f"group_reward returned {len(per_member)} entries for a group of "
                f"{len(group.trajectories)}; return one dict per trajectory, in order."
            )
        for trajectory, components in zip(group.trajectories, per_member, strict=True):
            if trajectory.turns:
                merge_components(trajectory.turns[-1].rewards, components, "group_reward")


async def _awaited(value: Any | Awaitable[Any]) -> Any:
    """What a reward function returned, whether or not it is a coroutine function."""
    return await value if inspect.isawaitable(value) else value


def merge_components(
    into: dict[str, float], components: Mapping[str, Any] | None, source: str
) -> None:
    """Adds named components to a turn, refusing anything that could silently spoil a return."""
    if components is None:
        return
    if not isinstance(components, Mapping):
        raise RewardError(
            f"{source} must return a dict of named components such as {{'accuracy': 1.0}}, "
            f"not {type(components).__name__}."
        )
    for name, value in components.items():
        if not isinstance(name, str):
            raise RewardError(f"{source}: component names are strings, not {name!r}.")
        if name in into:
            raise RewardError(f"{source}: component {name!r} is already taken; use another name.")
        number = float(value)
        if not math.isfinite(number):
            raise RewardError(f"{source}: component {name!r} is {number}; rewards must be finite.")
        into[name] = number
