"""What a finished group gets: the rewards that depend on the whole of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from rllib_gtpo.env import ToolEnv
from rllib_gtpo.episodes import group_trajectories
from rllib_gtpo.rewards.overlong import OverlongPenalty
from rllib_gtpo.rewards.shaping import Shaping
from rllib_gtpo.types import Group, Trajectory


class GroupScorer:
    """Scores groups one by one; `env` is asked for the rewards of groups."""

    def __init__(
        self, env: ToolEnv, shaping: Shaping | None, overlong_penalty: OverlongPenalty | None
    ) -> None:
        self._env, self._shaping, self._overlong_penalty = env, shaping, overlong_penalty
        self._thread: ThreadPoolExecutor | None = None

    async def score(self, trajectories: Sequence[Trajectory]) -> int | None:
        """Adds to the rewards of one group's members.

        Returns:
            1 if the group could not be shaped, else 0; None where none is to be.
        """
        (group,) = group_trajectories(trajectories)
        if self._overlong_penalty is not None:
            for trajectory in group.trajectories:
                self._overlong_penalty.score(trajectory)
        await self._env.rubric.score_group(self._env, group)
        return None if self._shaping is None else await self._shape(self._shaping, group)

    async def _shape(self, shaping: Shaping, group: Group) -> int:
        """In a thread, one group at a time: an embedder may wait for a service."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="shaping")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, shaping.score_groups, [group])

    def close(self) -> None:
        """Ends the thread."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
