"""One trajectory on its way: environment, RLlib episode and token context move together."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_gtpo.connectors.chat import COMPLETIONS, PROMPT_IDS
from rllib_gtpo.engines.base import Request, SamplingParams
from rllib_gtpo.env import ToolEnv, task_id
from rllib_gtpo.types import Completion, Observation, StopReason, Task, Trajectory, Turn

if TYPE_CHECKING:
    from rllib_gtpo.env_runner import GTPOEnvRunner

logger = logging.getLogger(__name__)

TURN_TIMEOUT_S = 300.0  # an environment that takes longer for one turn is taken for hung


class Rollout:
    """Asks for completions with `request()` and takes them with `take()` until `request()` is None.

    Nothing that the environment does raises here: it ends the trajectory with a StopReason.
    """

    def __init__(
        self,
        runner: GTPOEnvRunner,
        env: ToolEnv,
        task: Task,
        group_id: int,
        member: int,
        sampling: SamplingParams,
        key: tuple[int, ...],
    ) -> None:
        self.env = env
        self.episode = SingleAgentEpisode(
            observation_space=env.observation_space, action_space=env.action_space
        )
        self._runner = runner
        self._task, self._group_id, self._member = task, group_id, member
        self._sampling, self._key = sampling, key
        self._context: list[int] = []
        self._prompt_ids: list[int] = []  # what the newest observation added to the context
        self._closed = False

    def open(self) -> str | None:
        """Resets the environment; returns why the task cannot be rolled out at all, if so."""
        self._runner.callback("on_episode_created", self.episode)
        try:
            observation, infos = self.env.reset(options={"task": self._task})
        except Exception as error:
            self.env.trajectory = Trajectory(self._task)
            self._fail(StopReason.ENV_ERROR, error)
            observation, infos = Observation([]), {}
        self.trajectory.group_id, self.trajectory.member = self._group_id, self._member
        self.episode.add_env_reset(observation, infos)
        self._runner.callback("on_episode_start", self.episode)
        if self.done:
            return f"task {task_id(self._task)}: reset failed: {self.trajectory.error}"
        if not self._see_observation():
            return f"task {task_id(self._task)}: {self.trajectory.error}"
        if self._room < 1:
            return (
                f"task {task_id(self._task)}: its prompt has {len(self._context)} tokens and "
                "the context "
                f"holds {self._runner.engine.max_context}: shorten it, or raise max_tokens"
            )
        return None

    def again(self, env: ToolEnv, attempt: int) -> Rollout:
        """The same member from the start, with random numbers of its own."""
        key = (*self._key, attempt)
        sampling = self._sampling
        return Rollout(self._runner, env, self._task, self._group_id, self._member, sampling, key)

    @property
    def trajectory(self) -> Trajectory:
        """What the environment has recorded so far."""
        assert self.env.trajectory is not None, "open() first"
        return self.env.trajectory

    @property
    def done(self) -> bool:
        """Whether the trajectory has ended."""
        return self.trajectory.stop_reason is not None

    @property
    def _room(self) -> int:
        """How many more tokens the context holds."""
        return self._runner.engine.max_context - len(self._context)

    def request(self) -> Request | None:
        """What to generate next; None when the trajectory has ended."""
        if self.done:
            return None
        sampling = self._sampling
        if self._room < sampling.max_tokens:
            sampling = SamplingParams(
                self._room, sampling.temperature, sampling.top_p, sampling.stop_token_ids
            )
        return Request(self.episode.id_, self._context, sampling, (*self._key, len(self.episode)))

    async def take(self, completion: Completion) -> None:
        """One turn: parse, step the environment, record."""
        turn = self._to_turn(completion)
        self._context = self._context + completion.token_ids
        observation, terminated, truncated = Observation([]), False, True
        infos: dict[str, Any] = {}
        try:
            step = self.env.astep(turn)
            observation, _, terminated, truncated, infos = await asyncio.wait_for(
                step, TURN_TIMEOUT_S
            )
        except TimeoutError:
            self._fail(StopReason.ENV_TIMEOUT, TimeoutError(f"no answer in {TURN_TIMEOUT_S:g} s"))
        except Exception as error:
            self._fail(StopReason.ENV_ERROR, error)
        if len(self.trajectory.turns) == len(self.episode):  # it failed before it took the turn
            self.trajectory.turns.append(turn)
        if self.trajectory.stop_reason is StopReason.TURN_TRUNCATED and (
            len(self._context) >= self._runner.engine.max_context
        ):
            self.trajectory.stop_reason = StopReason.MAX_TOKENS
        self.episode.add_env_step(
            observation,
            turn.text,
            turn.reward,
            infos,
            terminated=terminated,
            truncated=truncated,
        )
        if not self.done:
            self._see_observation()
        self._runner.callback("on_episode_step", self.episode)
        if not self.done and self._room < 1:
            await self._end(StopReason.MAX_TOKENS)

    def close(self) -> None:
        """Frees what the trajectory holds in the engine and the environment; once is enough."""
        if self._closed:
            return
        self._closed = True
        self._runner.engine.release(self.episode.id_)
        try:
            self.env.close()
        except Exception as error:
            logger.warning("%s.close() raised: %r", type(self.env).__name__, error)
        self.env.close_servers()
        if not self.episode.is_done:
            self.episode.is_truncated = True

    def _see_observation(self) -> bool:
        """Adds the newest observation to the context; False if it cannot be rendered."""
        try:
            self._prompt_ids = self._runner.to_module(self.episode)[PROMPT_IDS][0]
        except Exception as error:
            self._fail(StopReason.ENV_ERROR, error)
            return False
        self._context = self._context + self._prompt_ids
        return True

    def _to_turn(self, completion: Completion) -> Turn:
        batch: dict[str, Any] = {PROMPT_IDS: [self._prompt_ids], COMPLETIONS: [completion]}
        turn: Turn = self._runner.to_env(self.episode, batch)[Columns.ACTIONS][0]
        return turn

    async def _end(self, reason: StopReason) -> None:
        try:
            await asyncio.wait_for(self.env.aend(reason), TURN_TIMEOUT_S)
        except TimeoutError:
            self._fail(StopReason.ENV_TIMEOUT, TimeoutError(f"no answer in {TURN_TIMEOUT_S:g} s"))
        except Exception as error:
            self._fail(StopReason.ENV_ERROR, error)
        self.episode.is_truncated = True

    def _fail(self, reason: StopReason, error: BaseException) -> None:
        trajectory = self.trajectory
        trajectory.stop_reason, trajectory.answer, trajectory.correct = reason, None, False
        trajectory.error = f"{type(error).__name__}: {error}"
        logger.debug("rollout ended by the environment", exc_info=error)
