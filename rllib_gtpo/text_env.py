"""Any gymnasium environment with text observations and actions, as a ToolEnv without tools."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym

from rllib_gtpo.env import ToolEnv
from rllib_gtpo.errors import EnvironmentFault
from rllib_gtpo.tools.threads import start
from rllib_gtpo.types import Observation, StopReason, Task, Trajectory, Turn

_SEEDS = {"train": range(0, 100_000), "validation": range(1_000_000, 1_001_000)}
_SEEDS["test"] = range(1_001_000, 1_002_000)


def as_tool_env(env: Any) -> ToolEnv:
    """The ToolEnv inside gymnasium's wrappers, or a text environment wrapped as one."""
    inner = getattr(env, "unwrapped", env)
    if isinstance(inner, ToolEnv):
        return inner
    if isinstance(env, gym.Env) and isinstance(env.observation_space, gym.spaces.Text):
        return TextEnv(env)
    raise EnvironmentFault(
        f"{type(inner).__name__} is neither a rllib_gtpo.ToolEnv nor a gymnasium environment "
        "with Text "
        "observations: derive it from ToolEnv."
    )


class TextEnv(ToolEnv):
    """One task per seed; observations become user messages; the environment's reward is component
    "env".

    A trajectory is correct where the last `info` says `is_success`.
    """

    max_turns = 32

    def __init__(self, env: Any) -> None:
        super().__init__()
        self.inner = env
        self._success = False

    def tasks(self, split: str) -> Iterable[Task]:
        """Seeds; the splits share none."""
        return [{"id": f"seed-{seed}", "seed": seed} for seed in _SEEDS[split]]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Resets the inner environment with the task's seed."""
        task = (options or {}).get("task") or {"id": f"seed-{seed}", "seed": seed}
        text, info = self.inner.reset(seed=task["seed"])
        self._success = False
        self.trajectory = Trajectory(task)
        return Observation([{"role": "user", "content": text}]), info

    async def astep(
        self, action: str | Turn
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Steps the inner environment with the turn's content, in a thread."""
        trajectory = self.trajectory
        assert trajectory is not None
        turn = Turn(0, text=action, content=action) if isinstance(action, str) else action
        turn.index = len(trajectory.turns)
        trajectory.turns.append(turn)
        outcome = await start(
            lambda: _outcome(self.inner, turn.content), asyncio.get_running_loop()
        )
        if isinstance(outcome, Exception):
            raise outcome
        text, reward, terminated, truncated, info = outcome
        turn.rewards["env"] = float(reward)
        self._success = bool(info.get("is_success", False))
        limit = len(trajectory.turns) >= self.turn_limit
        if terminated:
            await self.aend(StopReason.ENV_DONE)
        elif turn.finish != "stop":
            await self.aend(StopReason.TURN_TRUNCATED)
        elif truncated or limit:
            await self.aend(StopReason.MAX_TURNS)
        over = trajectory.stop_reason is not None
        return (
            Observation([{"role": "user", "content": text}]),
            turn.reward,
            terminated,
            over and not terminated,
            info,
        )

    def reward(self, trajectory: Trajectory, task: Task) -> Mapping[str, float]:
        """Nothing beyond what the environment gave."""
        return {}

    def correct(self, trajectory: Trajectory, task: Task) -> bool:
        """See the class."""
        return self._success

    def close(self) -> None:
        """Closes the inner environment."""
        self.inner.close()


def _outcome(env: Any, text: str) -> Any:
    """What the step returned, or the exception; in a daemon thread, which a hung step may keep."""
    try:
        return env.step(text)
    except Exception as error:
        return error
