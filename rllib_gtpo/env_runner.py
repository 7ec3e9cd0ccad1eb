"""The env runner: rolls out whole groups, every trajectory a task of its own over one engine."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
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

from rllib_gtpo.checks import evaluation_splits
from rllib_gtpo.engines.base import SamplingParams
from rllib_gtpo.env import ChatSpace, ToolEnv
from rllib_gtpo.episodes import attach_trajectory
from rllib_gtpo.errors import EnvironmentFault, GTPOError
from rllib_gtpo.group_rollout import GroupJob, GroupScheduler, Rollouts
from rllib_gtpo.group_scoring import GroupScorer
from rllib_gtpo.interruption import Stop
from rllib_gtpo.models import check_vocabulary
from rllib_gtpo.rl_module import RemoteModule
from rllib_gtpo.rollout import Rollout
from rllib_gtpo.rollout_stats import RolloutStats, Tally
from rllib_gtpo.task_stream import TaskStream
from rllib_gtpo.text_env import as_tool_env
from rllib_gtpo.tools.python import sandbox_restarts

UNSHAPED_GROUPS = "unshaped_groups"  # those whose texts could not be embedded
SANDBOX_RESTARTS = "sandbox_restarts"  # sandboxes whose own process was lost and replaced

__all__ = ["GTPOEnvRunner", "GroupJob", "Rollouts"]


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
        self._restarts = sandbox_restarts()
        self.codec = self.config.build_codec()
        self.make_env()
        shaping = self.config.build_shaping()
        self.make_module()
        self.engine = self.config.build_engine(self.module)
        overlong_penalty = self.config.build_overlong_penalty(self.engine.max_context)
        self._scorer = GroupScorer(self.env, shaping, overlong_penalty)
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
        self,
        jobs: Sequence[GroupJob],
        *,
        wanted: int | None = None,
        on_progress: Callable[[Tally], None] | None = None,
        on_group: Callable[[list[SingleAgentEpisode]], None] | None = None,
        stop: Stop = lambda: False,
    ) -> Rollouts:
        """Rolls out the groups; returns when the last one is finished and scored.

        A member whose environment broke is rolled out again, unless most of its group broke.  A
        training group that is still broken is left out: its members would be compared with
        failures that are not the policy's.  In an evaluation they count as failed.

        Args:
            jobs: The groups; their episodes are returned in this order.
            wanted: Stop when so many groups are finished, and drop the others except those that
                must finish; None: wait for all.
            on_progress: Called whenever a trajectory or a group ends.
            on_group: Takes the episodes of each group when it is finished and scored, in the order
                of their ends; then none are returned.
            stop: Asked five times a second whether to give up all of them and raise Interrupted.
        """
        out = Rollouts()
        finished: dict[int, list[SingleAgentEpisode]] = {}
        numbers: list[tuple[float, int]] = []

        def take(job: GroupJob, episodes: list[SingleAgentEpisode]) -> None:
            numbers.extend((episode.get_return(), len(episode)) for episode in episodes)
            if on_group is None:
                finished[job.position] = episodes
            else:
                on_group(episodes)

        GroupScheduler(
            self,
            jobs,
            out,
            wanted=wanted,
            on_group=take,
            on_progress=on_progress or (lambda tally: None),
            stop=stop,
        ).run()
        out.episodes = [e for job in jobs for e in finished.get(job.position, ())]
        out.weights_version = self.weights_version
        self._log(numbers)
        return out

    def try_sample_groups(
        self,
        jobs: Sequence[GroupJob],
        wanted: int | None = None,
        on_progress: Callable[[Tally], None] | None = None,
        weights_version: int = 0,
    ) -> Rollouts:
        """`sample_groups` for remote calls: an exception that escaped would end this actor
        instead.

        weights_version: Those that were sent here before.  Rollouts with older ones would be taken
            for the newest policy's.
        """
        try:
            if self.weights_version < weights_version:
                raise GTPOError(
                    f"Env runner {self.worker_index} has weights {self.weights_version}, though "
                    f"{weights_version} were sent to it: its log says what became of them (ray "
                    "logs).  Go on from the last checkpoint."
                )
            return self.sample_groups(jobs, wanted=wanted, on_progress=on_progress)
        except GTPOError as error:
            return Rollouts(failure=error)
        except Exception as error:  # it may not survive pickling, and its traceback would not
            return Rollouts(failure=EnvironmentFault(f"{error!r}\n{traceback.format_exc()}"))

    def new_rollout(
        self, job: GroupJob, member: int, attempt: int, stats: RolloutStats
    ) -> Rollout | str:
        """A member of a group, not opened yet; or why its task does not exist.

        Each attempt has random numbers of its own.
        """
        task = self.tasks.find(job.position, job.split)
        if isinstance(task, str):
            return task
        evaluation = self.config.in_evaluation
        sampling = SamplingParams(
            max_tokens=self.config.max_turn_tokens,
            temperature=(
                self.config.evaluation_temperature if evaluation else self.config.temperature
            ),
            top_p=self.config.top_p,
            stop_token_ids=self.codec.stop_token_ids,
        )
        seed = self.config.seed or 0
        key: tuple[int, ...] = (seed, int(evaluation), job.iteration, job.position, member)
        if attempt:
            key = (*key, attempt)
        return Rollout(self, task, job.position, member, sampling, key, stats)

    async def score_group(self, rollouts: Sequence[Rollout]) -> list[SingleAgentEpisode]:
        """Scores a whole group; from here on its rewards are final."""
        unshaped = await self._scorer.score([rollout.trajectory for rollout in rollouts])
        if unshaped is not None:
            self.metrics.log_value(UNSHAPED_GROUPS, unshaped, reduce="sum")
        for rollout in rollouts:
            attach_trajectory(rollout.episode, rollout.trajectory)
            self.callback("on_episode_end", rollout.episode, prev_episode_chunks=[])
        return [rollout.episode for rollout in rollouts]

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

    def _log(self, episodes: Sequence[tuple[float, int]]) -> None:
        """RLlib's sampling metrics, of the return and length of each episode."""
        restarts = sandbox_restarts()
        self.metrics.log_value(SANDBOX_RESTARTS, restarts - self._restarts, reduce="sum")
        self._restarts = restarts
        steps = sum(length for _, length in episodes)
        self.num_env_steps_sampled_lifetime += steps
        for key, value in ((NUM_ENV_STEPS_SAMPLED, steps), (NUM_EPISODES, len(episodes))):
            self.metrics.log_value(key, value, reduce="sum")
        for key, value in (
            (NUM_ENV_STEPS_SAMPLED_LIFETIME, steps),
            (NUM_EPISODES_LIFETIME, len(episodes)),
        ):
            self.metrics.log_value(key, value, reduce="lifetime_sum")
        for total, length in episodes:
            self.metrics.log_value(EPISODE_RETURN_MEAN, total, window=len(episodes))
            self.metrics.log_value(EPISODE_LEN_MEAN, length, window=len(episodes))

    # RLlib's EnvRunner interface.

    def make_env(self) -> None:
        """Makes the instance that serves tasks and group rewards (trajectories have their own)."""
        self.env = self.new_env()
        _ = self.env.tool_schemas  # a server that does not start is told here
        evaluation = self.config.in_evaluation
        self.tasks = TaskStream(
            self.env.tasks,
            type(self.env).__name__,
            split=evaluation_splits(self.config)[0] if evaluation else "train",
            seed=None if evaluation else self.config.seed or 0,
        )

    def new_env(self) -> ToolEnv:
        """An instance for one trajectory."""
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
        check_vocabulary(self.codec.tokenizer, self.module.vocab_size)

    def get_spaces(self) -> dict[str, Any]:
        """Chat spaces everywhere: text has no numeric form."""
        spaces = (ChatSpace(), ChatSpace())
        return {
            INPUT_ENV_SPACES: spaces,
            INPUT_ENV_SINGLE_SPACES: spaces,
            DEFAULT_MODULE_ID: spaces,
        }

    @property
    def weights_version(self) -> int:
        """Of the weights that it samples with: how many updates there were before."""
        return self._weights_seq_no

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
        self._scorer.close()
        self.env.close()
        self.env.close_servers()
        self.engine.close()


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
