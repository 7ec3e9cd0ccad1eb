"""One trajectory on its way: environment, RLlib episode and token context move together."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ray.rllib.core.columns import Columns
from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_gtpo.connectors.chat import COMPLETIONS, PROMPT_IDS
from rllib_gtpo.engines.base import Request, SamplingParams
from rllib_gtpo.env import ToolEnv, task_id
from rllib_gtpo.errors import EngineError
from rllib_gtpo.rollout_stats import RolloutStats
from rllib_gtpo.types import Completion, Observation, StopReason, Task, Trajectory, Turn

if TYPE_CHECKING:
    from rllib_gtpo.env_runner import GTPOEnvRunner

logger = logging.getLogger(__name__)

TURN_TIMEOUT_S = 300.0  # an environment that takes longer for one turn is taken for hung
ENGINE_ATTEMPTS = 3  # to get a completion from an engine that fails
ENGINE_PAUSE_S = 0.1  # before the second attempt; then twice as long


class Rollout:
    """Gets completions with `sample()` and takes them with `take()` until `sample()` is None.

    Nothing that the environment or the engine does raises here: it ends the trajectory with a
    StopReason.  Only a request that no engine can serve raises.
    """

    def __init__(
        self,
        runner: GTPOEnvRunner,
        task: Task,
        group_id: int,
        member: int,
        sampling: SamplingParams,
        key: tuple[int, ...],
        stats: RolloutStats,
    ) -> None:
        self.trajectory = Trajectory(task, group_id, member)
        self.episode = SingleAgentEpisode(
            observation_space=runner.env.observation_space, action_space=runner.env.action_space
        )
        self._runner = runner
        self._env: ToolEnv | None = None  # while the trajectory is open
        self._sampling, self._key = sampling, key
        self._stats = stats
        self._context: list[int] = []
        self._prompt_ids: list[int] = []  # what the newest observation added to the context
        self._asked_at = 0.0  # when the newest completion was asked for

    def open(self) -> str | None:
        """Makes and resets the environment; returns why the task cannot be rolled out at all, if
        so."""
        self._runner.callback("on_episode_created", self.episode)
        task, placeholder = self.trajectory.task, self.trajectory
        observation: Observation = Observation([])
        infos: dict[str, Any] = {}
        try:
            self._env = self._runner.new_env()
            observation, infos = self._env.reset(options={"task": task})
            if self._env.trajectory is not None:
                self.trajectory = self._env.trajectory
        except Exception as error:
            self._fail(StopReason.ENV_ERROR, error)
        self.trajectory.group_id = placeholder.group_id
        self.trajectory.member = placeholder.member
        self.episode.add_env_reset(observation, infos)
        self._runner.callback("on_episode_start", self.episode)
        if self.done:
            return f"task {task_id(task)}: reset failed: {self.trajectory.error}"
        with self._overhead():
            seen = self._see_observation()
        if not seen:
            return f"task {task_id(task)}: {self.trajectory.error}"
        if self._room < 1:
            return (
                f"task {task_id(task)}: its prompt has {len(self._context)} tokens and the context "
                f"holds {self._runner.engine.max_context}: shorten it, or raise max_tokens"
            )
        return None

    @property
    def done(self) -> bool:
        """Whether the trajectory has ended."""
        return self.trajectory.stop_reason is not None

    @property
    def _room(self) -> int:
        return self._runner.engine.max_context - len(self._context)

    async def sample(self) -> Completion | None:
        """What the policy says next, or None if the trajectory has ended.

        A request that the engine fails is sent again a few times.
        """
        if self.done:
            return None
        sampling = self._sampling
        if self._room < sampling.max_tokens:
            sampling = SamplingParams(
                self._room, sampling.temperature, sampling.top_p, sampling.stop_token_ids
            )
        key = (*self._key, len(self.episode))
        request = Request(self.episode.id_, self._context, sampling, key)
        self._asked_at = time.perf_counter()
        for attempt in range(1, ENGINE_ATTEMPTS + 1):
            try:
                with _own_cancellation("the engine cancelled a request"):
                    return await self._runner.engine.generate(request)
            except EngineError as error:
                if attempt == ENGINE_ATTEMPTS:
                    self._fail(StopReason.ENGINE_ERROR, error)
                    self.episode.is_truncated = True
                    break
                self._stats.engine_retries += 1
                await asyncio.sleep(ENGINE_PAUSE_S * 2 ** (attempt - 1))
        return None

    async def take(self, completion: Completion) -> None:
        """One turn: parse, step the environment, record."""
        seconds = time.perf_counter() - self._asked_at
        try:
            with self._overhead():
                turn = self._to_turn(completion)
                turn.seconds = seconds
                self._context += completion.token_ids
        except Exception as error:
            self._fail(StopReason.ENV_ERROR, error)
            self.episode.is_truncated = True
            return
        step = await self._step(turn)
        if len(self.trajectory.turns) == len(self.episode):  # it failed before it took the turn
            self.trajectory.turns.append(turn)
        if self.trajectory.stop_reason is StopReason.TURN_TRUNCATED and self._room < 1:
            self.trajectory.stop_reason = StopReason.MAX_TOKENS
        with self._overhead():
            self._record(turn, *step)
        if not self.done and self._room < 1:
            await self._end(StopReason.MAX_TOKENS)

    def drop(self) -> None:
        """Ends a trajectory that is not needed any more, unless it has ended by itself."""
        if not self.done:
            self.trajectory.stop_reason = StopReason.DROPPED

    def close(self) -> None:
        """Frees what the trajectory holds in the engine and the environment; once is enough."""
        self._runner.engine.release(self.episode.id_)
        env, self._env, self._context = self._env, None, []
        try:
            if env is not None:
                env.close()
        except Exception as error:
            logger.warning("%s.close() raised: %r", type(env).__name__, error)
        if env is not None:
            env.close_servers()
        if not self.episode.is_done:
            self.episode.is_truncated = True

    async def _step(self, turn: Turn) -> tuple[Observation, bool, bool, dict[str, Any]]:
        """The environment's answer: observation, terminated, truncated, infos."""
        assert self._env is not None
        try:
            with _own_cancellation("the environment cancelled its step"):
                async with asyncio.timeout(TURN_TIMEOUT_S) as limit:
                    observation, _, terminated, truncated, infos = await self._env.astep(turn)
            return observation, terminated, truncated, infos
        except Exception as error:
            self._fail_in_env(error, limit)
            return Observation([]), False, True, {}

    def _record(
        self,
        turn: Turn,
        observation: Observation,
        terminated: bool,
        truncated: bool,
        infos: dict[str, Any],
    ) -> None:
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

    def _see_observation(self) -> bool:
        """Adds the newest observation to the context; False if it cannot be rendered."""
        try:
            self._prompt_ids = self._runner.to_module(self.episode)[PROMPT_IDS][0]
        except Exception as error:
            self._fail(StopReason.ENV_ERROR, error)
            return False
        self._context += self._prompt_ids
        return True

    def _to_turn(self, completion: Completion) -> Turn:
        batch: dict[str, Any] = {PROMPT_IDS: [self._prompt_ids], COMPLETIONS: [completion]}
        turn: Turn = self._runner.to_env(self.episode, batch)[Columns.ACTIONS][0]
        return turn

    async def _end(self, reason: StopReason) -> None:
        assert self._env is not None
        try:
            with _own_cancellation("the environment cancelled its end"):
                async with asyncio.timeout(TURN_TIMEOUT_S) as limit:
                    await self._env.aend(reason)
        except Exception as error:
            self._fail_in_env(error, limit)
        self.episode.is_truncated = True

    def _fail_in_env(self, error: Exception, limit: asyncio.Timeout) -> None:
        if limit.expired():
            error = TimeoutError(f"no answer in {TURN_TIMEOUT_S:g} s")
            self._fail(StopReason.ENV_TIMEOUT, error)
        else:
            self._fail(StopReason.ENV_ERROR, error)

    def _fail(self, reason: StopReason, error: BaseException) -> None:
        trajectory = self.trajectory
        trajectory.stop_reason, trajectory.answer, trajectory.correct = reason, None, False
        trajectory.error = f"{type(error).__name__}: {error}"
        logger.debug("rollout ended by the environment or the engine", exc_info=error)

    @contextmanager
    def _overhead(self) -> Iterator[None]:
        """Counts the time as the runner's own."""
        began = time.thread_time()
        try:
            yield
        finally:
            self._stats.overhead_s += time.thread_time() - began


@contextmanager
def _own_cancellation(what: str) -> Iterator[None]:
    """Tells a CancelledError of somebody else's making from the end of this rollout."""
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise EngineError(what) from error
