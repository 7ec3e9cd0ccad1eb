"""The env runner: rolls out whole groups, every trajectory a task of its own over one engine."""

from __future__ import annotations

import asyncio
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.rllib.callbacks.utils import make_callback
from ray.rllib.core import (
    COMPONENT_ENV_TO_MODULE_CONNECTOR,
    COMPONENT_MODULE_TO_ENV_CONNECTOR,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)
from ray.rllib.env import INPUT_ENV_SINGLE_SPACES, INPUT_ENV_SPACES
from ray.rllib.env.env_context import EnvContext
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.checkpoints import Checkpointable
from ray.rllib.utils.framework import get_device
from ray.rllib.utils.metrics import (
    EPISODE_LEN_MEAN,
    EPISODE_RETURN_MEAN,
    NUM_ENV_STEPS_SAMPLED,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_EPISODES,
    NUM_EPISODES_LIFETIME,
    WEIGHTS_SEQ_NO,
)

from rllib_gtpo.aio import run_coroutine
from rllib_gtpo.checks import evaluation_splits
from rllib_gtpo.engines.base import SamplingParams
from rllib_gtpo.env import ChatSpace, ToolEnv, task_id
from rllib_gtpo.episodes import attach_trajectory, group_trajectories
from rllib_gtpo.errors import ConfigError, DataError, EnvironmentFault, GTPOError
from rllib_gtpo.rl_module import RemoteModule
from rllib_gtpo.rollout import Rollout
from rllib_gtpo.shuffling import EndlessOrder
from rllib_gtpo.text_env import as_tool_env
from rllib_gtpo.tools.python import sandbox_restarts
from rllib_gtpo.types import Task, Trajectory

ATTEMPTS = 3  # to roll out a member whose environment breaks
UNSHAPED_GROUPS = "unshaped_groups"  # those whose texts could not be embedded
SANDBOX_RESTARTS = "sandbox_restarts"  # sandboxes whose own process was lost and replaced


@dataclass
class GroupJob:
    """A group to roll out.

    position: index into the endless, seeded stream of tasks; also the group's id.
    members: how many trajectories.  iteration: part of the sampler's key.
    split: where the task is; None: the training split, or the first one of an evaluation.
    """

    position: int
    members: int
    iteration: int
    split: str | None = None


@dataclass
class Rollouts:
    """What a runner gives back: the episodes of complete groups, and what became of the others.

    skipped: Position -> why its task cannot be rolled out at all.
    incomplete: Position -> what broke the environment of members, again and again.
    discarded: Rollouts that broke and were rolled out again, and those of incomplete groups.
    """

    episodes: list[SingleAgentEpisode] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    incomplete: dict[int, str] = field(default_factory=dict)
    discarded: list[Trajectory] = field(default_factory=list)
    failure: Exception | None = None  # what went wrong, if the runner itself could not go on


class GTPOEnvRunner(EnvRunner, Checkpointable):
    """Rolls out groups of a ToolEnv's tasks with the module's weights."""

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self._env_creator: Callable[[EnvContext], Any] = kwargs["env_creator"]
        self._device = get_device(
            self.config, 0 if not self.worker_index else self.config.num_gpus_per_env_runner
        )
        self._callbacks = [cls() for cls in _as_list(self.config.callbacks_class)]
        self._weights_seq_no = 0
        self._tasks: dict[str, list[Task]] = {}  # of the splits that were asked for
        self._order: EndlessOrder | None = None  # of the training tasks
        self._restarts = sandbox_restarts()
        self.codec = self.config.build_codec()
        self.make_env()
        self._shaping = self.config.build_shaping()
        self.make_module()
        self.engine = self.config.build_engine(self.module)
        self._overlong_penalty = self.config.build_overlong_penalty(self.engine.max_context)
        self._env_to_module = self.config.build_env_to_module_connector(
            env=self.env, spaces=self.get_spaces(), device=self._device, codec=self.codec
        )
        self._module_to_env = self.config.build_module_to_env_connector(
            env=self.env, spaces=self.get_spaces(), codec=self.codec
        )

    # Rollouts.

    def sample(self, *, num_episodes: int | None = None, **kwargs: Any) -> list[SingleAgentEpisode]:
        """RLlib's entry point: at least `num_episodes` episodes, as whole groups from the start of
        the split.

        Training and evaluation call `sample_groups`, which says which groups.
        """
        members = (
            self.config.evaluation_samples_per_task
            if self.config.in_evaluation
            else self.config.group_size
        )
        count = -(-(num_episodes or members) // members)
        return self.sample_groups([GroupJob(p, members, 0) for p in range(count)]).episodes

    def sample_groups(
        self, jobs: Sequence[GroupJob], on_trajectory: Callable[[], None] | None = None
    ) -> Rollouts:
        """Rolls out the groups; returns when the last one is finished and scored.

        A member whose environment broke is rolled out again, unless most of its group broke.  A
        training group that is still broken is left out: its members would be compared with
        failures that are not the policy's.  In an evaluation they count as failed.
        """
        out = Rollouts()
        rollouts = [r for job in jobs for r in self._open_group(job, out)]
        run = self._run_in_step if self.config.deterministic else self._run_freely
        try:
            run_coroutine(run(rollouts, on_trajectory or (lambda: None)))
            for attempt in range(1, ATTEMPTS):
                again = self._reopen_broken(rollouts, attempt, out)
                run_coroutine(run(again, lambda: None))
        except BaseException:
            for rollout in rollouts:
                rollout.close()
            raise
        if not self.config.in_evaluation:
            rollouts = self._complete(rollouts, out)
        out.episodes = self._finish(rollouts)
        self._log(out.episodes)
        return out

    def try_sample_groups(self, jobs: Sequence[GroupJob]) -> Rollouts:
        """`sample_groups` for remote calls: an exception that escaped would end this actor
        instead."""
        try:
            return self.sample_groups(jobs)
        except GTPOError as error:
            return Rollouts(failure=error)
        except Exception as error:  # it may not survive pickling, and its traceback would not
            return Rollouts(failure=EnvironmentFault(f"{error!r}\n{traceback.format_exc()}"))

    def task_at(self, position: int, split: str | None = None) -> Task | None:
        """The task at a position of the endless shuffled stream, or of an evaluation split.

        None behind the end of an evaluation split.
        """
        tasks = self._tasks_of(split or self._default_split)
        if not self.config.in_evaluation:
            self._order = self._order or EndlessOrder(len(tasks), self.config.seed or 0)
            return tasks[self._order[position]]
        return tasks[position] if position < len(tasks) else None

    @property
    def _default_split(self) -> str:
        return evaluation_splits(self.config)[0] if self.config.in_evaluation else "train"

    def _tasks_of(self, split: str) -> list[Task]:
        if split not in self._tasks:
            tasks = list(self.env.tasks(split))
            if not tasks:
                raise DataError(
                    f"{type(self.env).__name__}.tasks({split!r}) has no rows: check the data, or "
                    "set evaluation(split=...) to a split that exists."
                )
            self._tasks[split] = tasks
        return self._tasks[split]

    def _open_group(self, job: GroupJob, out: Rollouts) -> list[Rollout]:
        split = job.split or self._default_split
        task = self.task_at(job.position, split)
        if task is None:
            out.skipped[job.position] = f"{split!r} has only {len(self._tasks[split])} tasks"
            return []
        sampling = SamplingParams(
            max_tokens=self.config.max_turn_tokens,
            temperature=(
                self.config.evaluation_temperature
                if self.config.in_evaluation
                else self.config.temperature
            ),
            top_p=self.config.top_p,
            stop_token_ids=self.codec.stop_token_ids,
        )
        key = (self.config.seed or 0, int(self.config.in_evaluation), job.iteration, job.position)
        members = [
            Rollout(self, self._new_env(), task, job.position, member, sampling, (*key, member))
            for member in range(job.members)
        ]
        first = members[0].open()
        if first is not None:
            out.skipped[job.position] = first
            members[0].close()
            return []
        for rollout in members[1:]:
            rollout.open()
        return members

    def _reopen_broken(self, rollouts: list[Rollout], attempt: int, out: Rollouts) -> list[Rollout]:
        """Puts new rollouts in the place of broken ones, where most of the group is sound."""
        broken = Counter(r.trajectory.group_id for r in rollouts if r.trajectory.broken)
        sound = Counter(r.trajectory.group_id for r in rollouts if not r.trajectory.broken)
        again = []
        for index, old in enumerate(rollouts):
            group = old.trajectory.group_id
            if old.trajectory.broken and broken[group] <= sound[group]:
                out.discarded.append(old.trajectory)
                rollouts[index] = old.again(self._new_env(), attempt)
                rollouts[index].open()
                again.append(rollouts[index])
        return again

    def _complete(self, rollouts: list[Rollout], out: Rollouts) -> list[Rollout]:
        """The rollouts of groups without a broken member."""
        for t in (r.trajectory for r in rollouts):
            if t.broken:
                reason = f"task {task_id(t.task)}: member {t.member} ended in {t.stop_reason}"
                out.incomplete.setdefault(t.group_id, f"{reason}: {t.error}")
        incomplete = [r for r in rollouts if r.trajectory.group_id in out.incomplete]
        out.discarded += [r.trajectory for r in incomplete]
        return [r for r in rollouts if r.trajectory.group_id not in out.incomplete]

    async def _run_freely(self, rollouts: list[Rollout], finished: Callable[[], None]) -> None:
        """Each trajectory for itself: a slow tool or a long answer holds up nobody else."""
        slots = asyncio.Semaphore(self.config.max_concurrency)

        async def run(rollout: Rollout) -> None:
            async with slots:
                while (request := rollout.request()) is not None:
                    await rollout.take(await self.engine.generate(request))
                rollout.close()
                finished()

        tasks = [asyncio.ensure_future(run(r)) for r in rollouts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _run_in_step(self, rollouts: list[Rollout], finished: Callable[[], None]) -> None:
        """All trajectories turn by turn in a fixed order, so that batches and sums repeat bit for
        bit."""
        for start in range(0, len(rollouts), self.config.max_concurrency):
            live = rollouts[start : start + self.config.max_concurrency]
            while live:
                asking = [(r, request) for r in live if (request := r.request()) is not None]
                completions = await asyncio.gather(*(self.engine.generate(q) for _, q in asking))
                for (rollout, _), completion in zip(asking, completions, strict=True):
                    await rollout.take(completion)
                for rollout in live:
                    if rollout.done:
                        rollout.close()
                        finished()
                live = [rollout for rollout in live if not rollout.done]

    def _finish(self, rollouts: list[Rollout]) -> list[SingleAgentEpisode]:
        """Scores whole groups; from here on rewards are final."""
        groups = group_trajectories([r.trajectory for r in rollouts])
        if self._overlong_penalty is not None:
            for rollout in rollouts:
                self._overlong_penalty.score(rollout.trajectory)
        for group in groups:
            self.env.rubric.score_group(self.env, group)
        if self._shaping is not None:
            unshaped = self._shaping.score_groups(groups)
            self.metrics.log_value(UNSHAPED_GROUPS, unshaped, reduce="sum")
        for rollout in rollouts:
            attach_trajectory(rollout.episode, rollout.trajectory)
            self.callback("on_episode_end", rollout.episode, prev_episode_chunks=[])
        return [r.episode for r in rollouts]

    def callback(self, which: str, episode: SingleAgentEpisode, **kwargs: Any) -> None:
        """Calls the user's RLlib callbacks, as RLlib's own runners do."""
        make_callback(
            which,
            callbacks_objects=self._callbacks,
            callbacks_functions=getattr(self.config, f"callbacks_{which}"),
            kwargs={
                "episode": episode,
                "env_runner": self,
                "metrics_logger": self.metrics,
                "env": self.env,
                "rl_module": self.module,
                "env_index": 0,
                **kwargs,
            },
        )

    def to_module(self, episode: SingleAgentEpisode) -> dict[str, Any]:
        """Runs the env-to-module pipeline on the newest observation of an episode."""
        batch: dict[str, Any] = self._env_to_module(
            rl_module=self.module, batch={}, episodes=[episode], explore=True, shared_data={}
        )
        return batch

    def to_env(self, episode: SingleAgentEpisode, batch: dict[str, Any]) -> dict[str, Any]:
        """Runs the module-to-env pipeline on what the engine sampled for an episode."""
        result: dict[str, Any] = self._module_to_env(
            rl_module=self.module, batch=batch, episodes=[episode], explore=True, shared_data={}
        )
        return result

    def _log(self, episodes: list[SingleAgentEpisode]) -> None:
        restarts = sandbox_restarts()
        self.metrics.log_value(SANDBOX_RESTARTS, restarts - self._restarts, reduce="sum")
        self._restarts = restarts
        steps = sum(len(e) for e in episodes)
        self.num_env_steps_sampled_lifetime += steps
        for key, value in ((NUM_ENV_STEPS_SAMPLED, steps), (NUM_EPISODES, len(episodes))):
            self.metrics.log_value(key, value, reduce="sum")
        for key, value in (
            (NUM_ENV_STEPS_SAMPLED_LIFETIME, steps),
            (NUM_EPISODES_LIFETIME, len(episodes)),
        ):
            self.metrics.log_value(key, value, reduce="lifetime_sum")
        for episode in episodes:
            self.metrics.log_value(EPISODE_RETURN_MEAN, episode.get_return(), window=len(episodes))
            self.metrics.log_value(EPISODE_LEN_MEAN, len(episode), window=len(episodes))

    # RLlib's EnvRunner interface.

    def make_env(self) -> None:
        """Makes the instance that serves tasks and group rewards (trajectories have their own)."""
        self.env = self._new_env()
        _ = self.env.tool_schemas  # a server that does not start is told here

    def _new_env(self) -> ToolEnv:
        context = EnvContext(
            self.config.env_config,
            worker_index=self.worker_index or 0,
            num_workers=self.num_workers,
            remote=self.config.remote_worker_envs,
        )
        env = as_tool_env(self._env_creator(context))
        env.rubric = self.config.build_rubric()
        env.call_format = self.codec.call_format
        if self.config.max_turns is not None:
            env.turn_limit = self.config.max_turns
        if self.config.max_invalid_calls is not None:
            env.max_invalid_calls = self.config.max_invalid_calls
        return env

    def make_module(self) -> None:
        """Builds the module whose model the engine runs, or what stands in for it."""
        spec = self.config.get_rl_module_spec(spaces=self.get_spaces(), inference_only=True)
        if self.config.engine == "vllm":
            spec.module_class = RemoteModule
        self.module = spec.build()
        self.module.to(self._device)
        vocabulary = len(self.codec.tokenizer)
        if vocabulary > self.module.vocab_size:
            raise ConfigError(
                f"The tokenizer has {vocabulary} tokens and the model only "
                f"{self.module.vocab_size}: "
                "use the tokenizer that belongs to the model."
            )

    def get_spaces(self) -> dict[str, Any]:
        """Chat spaces everywhere: text has no numeric form."""
        spaces = (ChatSpace(), ChatSpace())
        return {
            INPUT_ENV_SPACES: spaces,
            INPUT_ENV_SINGLE_SPACES: spaces,
            DEFAULT_MODULE_ID: spaces,
        }

    def get_metrics(self) -> Any:
        """RLlib's standard sampling metrics since the last call."""
        return self.metrics.reduce()

    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Lifetime counter and, unless left out, the weights."""
        state: dict[str, Any] = {
            NUM_ENV_STEPS_SAMPLED_LIFETIME: self.num_env_steps_sampled_lifetime
        }
        if self._check_component(COMPONENT_RL_MODULE, components, not_components):
            state[COMPONENT_RL_MODULE] = self.module.get_state(**kwargs)
            state[WEIGHTS_SEQ_NO] = self._weights_seq_no
        for name, pipeline in (
            (COMPONENT_ENV_TO_MODULE_CONNECTOR, self._env_to_module),
            (COMPONENT_MODULE_TO_ENV_CONNECTOR, self._module_to_env),
        ):
            if self._check_component(name, components, not_components):
                state[name] = pipeline.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes new weights (a state or a reference to one) and tells the engine."""
        if COMPONENT_ENV_TO_MODULE_CONNECTOR in state:
            self._env_to_module.set_state(state[COMPONENT_ENV_TO_MODULE_CONNECTOR])
        if COMPONENT_MODULE_TO_ENV_CONNECTOR in state:
            self._module_to_env.set_state(state[COMPONENT_MODULE_TO_ENV_CONNECTOR])
        if COMPONENT_RL_MODULE in state:
            version = state.get(WEIGHTS_SEQ_NO, 0)
            if version == 0 or version > self._weights_seq_no:
                weights = state[COMPONENT_RL_MODULE]
                if isinstance(weights, ray.ObjectRef):
                    weights = ray.get(weights)
                self.module.set_state(weights.get(DEFAULT_MODULE_ID, weights))
                self._weights_seq_no = version or self._weights_seq_no
                self.engine.weights_updated(self._weights_seq_no)
        if NUM_ENV_STEPS_SAMPLED_LIFETIME in state:
            self.num_env_steps_sampled_lifetime = state[NUM_ENV_STEPS_SAMPLED_LIFETIME]

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See Checkpointable."""
        return (), {"config": self.config, "env_creator": self._env_creator}

    def get_checkpointable_components(self) -> list[tuple[str, Any]]:
        """See Checkpointable."""
        return [
            (COMPONENT_RL_MODULE, self.module),
            (COMPONENT_ENV_TO_MODULE_CONNECTOR, self._env_to_module),
            (COMPONENT_MODULE_TO_ENV_CONNECTOR, self._module_to_env),
        ]

    def assert_healthy(self) -> None:
        """RLlib asks this of remote runners after a restart."""
        assert self.env is not None and self.module is not None

    def stop(self) -> None:
        """Closes the environment and the engine."""
        self.env.close()
        self.env.close_servers()
        self.engine.close()


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
