"""GTPO as an RLlib Algorithm: sample whole groups, update, sync."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import ray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.utils import _get_learner_bundles as get_learner_bundles
from ray.rllib.core import COMPONENT_LEARNER_GROUP, COMPONENT_RL_MODULE, DEFAULT_MODULE_ID
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.env.env_context import EnvContext
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    EVALUATION_RESULTS,
    LEARNER_RESULTS,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    WEIGHTS_SEQ_NO,
)
from ray.tune.execution.placement_groups import PlacementGroupFactory

from rllib_gtpo.architecture import check_shapes, write_shapes
from rllib_gtpo.cold_start import ColdStart, Demonstrations, load_demonstrations
from rllib_gtpo.config import GRPOConfig, GTPOConfig
from rllib_gtpo.engines.vllm import EnginePool, EngineSettings
from rllib_gtpo.engines.vllm.settings import SHARED_MEMORY
from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.errors import Interrupted
from rllib_gtpo.group_rollout import GroupJob
from rllib_gtpo.interruption import end_lost
from rllib_gtpo.metrics import (
    fault_metrics,
    rollout_metrics,
    staleness_metrics,
    straggler_metrics,
)
from rllib_gtpo.packing import shard_groups
from rllib_gtpo.placement import (
    DROP_WEIGHTS,
    KEEP_WEIGHTS,
    SHARED,
    Turns,
    reserve,
    with_engines,
)
from rllib_gtpo.progress import Progress, RolloutProgress
from rllib_gtpo.record.location import Location
from rllib_gtpo.record.recorder import Recorder
from rllib_gtpo.sampling import Sampled, Step, choose_jobs, sample_groups, sample_step
from rllib_gtpo.strategies.checkpoint import read_shards, write_shards
from rllib_gtpo.summary import summary_line
from rllib_gtpo.supervision import Supervised, call_learners, supervise
from rllib_gtpo.text_env import as_tool_env

_STATE = "gtpo"
_LEARNER_METRICS = (
    *("loss", "policy", "mismatch", "clip", "ratio", "grad"),
    *("group", "advantage", "shaping", "overlong", "time", "packing", "lr"),
)


@dataclass
class ProgressMade:
    """What a resumed run must know besides weights and optimizer."""

    cold_start: Supervised = field(default_factory=Supervised)
    cold_start_done: bool = False
    next_position: int = 0  # in the endless stream of training tasks
    owed_positions: list[int] = field(default_factory=list)  # of dropped groups; they come first
    tokens_lifetime: int = 0
    accuracy_before: float | None = None
    accuracy_after: float | None = None

    @property
    def training_done(self) -> tuple[int, int]:
        """Changes whenever the weights do."""
        return self.cold_start.steps, self.tokens_lifetime

    @classmethod
    def of(cls, state: dict[str, Any]) -> ProgressMade:
        """What `asdict` made."""
        return cls(**{**state, "cold_start": Supervised(**state["cold_start"])})


class GTPO(Algorithm):
    """Group Turn Policy Optimization."""

    config: Any

    @classmethod
    def get_default_config(cls) -> GTPOConfig:
        """See Algorithm."""
        return GTPOConfig()

    def setup(self, config: Any) -> None:
        """Builds runners and learners; the cold start waits for the first train() or evaluate()."""
        self.progress_made = ProgressMade()
        self._demonstrations: Demonstrations | None = None
        self._stop_requested = False
        self._evaluation_left = False  # in the middle
        self.pause_every_s = 0.0  # of a cold start that is run by a hook
        self._credit_rule = config.build_credit_rule()
        self._evaluated: tuple[tuple[int, int], float] | None = None  # training done, accuracy
        self.train_meanwhile: Callable[[], None] | None = None  # while an evaluation samples
        self.engines: EnginePool | None = None  # of vLLM
        self._turns: Turns | None = None  # of engines and learners on the same devices
        self._bundles: Any = None  # a placement group of this run's own
        self.run_directory: str | None = None  # of `rllib train`, instead of RLlib's own
        self._recorder = Recorder.of(config)
        if config.engine != "vllm":
            super().setup(config)
            return
        self._start_engines()
        try:
            super().setup(self.config)
            self._give_engines_the_weights()
        except BaseException:
            self._stop_engines()
            raise

    def _start_engines(self) -> None:
        """Starts vLLM, and tells all runners where to find it."""
        settings = EngineSettings.of(self.config)
        if self.config.placement == SHARED:
            engine = settings.resources()
            learners = get_learner_bundles(self.config)
            shared = with_engines(learners, engine, len(learners), shared=True)
            bundles, self._bundles = reserve(shared)
            settings = replace(settings, bundles=bundles)
        self.engines = EnginePool.start(settings)
        if self.config.placement == SHARED:
            # Of a model with an adapter, learners send no more than that.
            self._turns = Turns(self.engines, KEEP_WEIGHTS if settings.lora else DROP_WEIGHTS)
        self.config = self.config.copy(copy_frozen=False)
        self.config.engine_pool = self.engines.name
        self.config.learner_bundles = self._bundles
        self.config.freeze()

    def _give_engines_the_weights(self) -> None:
        """The first ones, after which env runners may sample; they hold none themselves."""
        for group in (self.env_runner_group, self.eval_env_runner_group):
            if group is not None:
                group.sync_weights = lambda *args, **kwargs: None
        self.sync_weights()

    def _stop_engines(self) -> None:
        if self.engines is not None:
            self.engines.stop()
            self.engines = None
        if self._bundles is not None:
            ray.util.remove_placement_group(self._bundles)
            self._bundles = None

    def cleanup(self) -> None:
        """RLlib's, and the engines."""
        for runners in (self.env_runner_group, self.eval_env_runner_group):
            if runners is not None:
                end_lost(runners)
        super().cleanup()
        if self._recorder is not None:
            self._recorder.close()
        self._stop_engines()

    @classmethod
    def default_resource_request(cls, config: Any) -> Any:
        """RLlib's, and the devices of the engines; see `placement.with_engines`."""
        request = super().default_resource_request(config)
        settings: Any = cls.get_default_config().update_from_dict(config)
        if settings.engine != "vllm":
            return request
        bundles = with_engines(
            request.bundles,
            EngineSettings.of(settings).resources(),
            settings.num_engines,
            shared=settings.placement == SHARED,
        )
        return PlacementGroupFactory(bundles, strategy=settings.placement_strategy)

    @property
    def cold_start(self) -> ColdStart | None:
        """The cold start's settings, if there is one."""
        return ColdStart.of(self.config.cold_start)

    # One iteration.

    def step(self) -> Any:
        """RLlib's, without an evaluation's metrics where there was no evaluation."""
        try:
            results = super().step()
        except Interrupted:
            self._stop_requested = False
            raise
        due = self.config.evaluation_interval
        if self._evaluation_left or not due or (self.iteration + 1) % due:
            results.pop(EVALUATION_RESULTS, None)
        self._evaluation_left = False
        return results

    def _run_one_training_iteration_and_evaluation_in_parallel(self) -> Any:
        """RLlib's, with another division of labour: see `evaluation.sample_while_training`."""
        trained: list[Any] = []
        self.train_meanwhile = lambda: trained.append(self._run_one_training_iteration())
        try:
            evaluated = self._run_one_evaluation()
        finally:
            self.train_meanwhile = None
        if not trained:
            self._evaluation_left = False
            raise Interrupted("stopped in the middle of an iteration's rollouts")
        results, context = trained[0]
        timers = results["timers"]  # that of the evaluation had no value yet
        results["timers"] = {name: value for name, value in timers.items() if value == value}
        return results, evaluated, context

    def training_step(self) -> None:
        """Sample groups, update the learners, sync the weights."""
        self.run_cold_start_once()
        began = time.perf_counter()
        step = self._sample_step()
        sampled = time.perf_counter()
        self._update_learners(step)
        updated = time.perf_counter()
        self.sync_weights()
        synced = time.perf_counter()
        recorded = self._record(step)
        trajectories = [t for g in step.groups for t in g.trajectories] + step.left_out
        tokens = sum(t.num_trained_tokens for t in trajectories)
        self.progress_made.tokens_lifetime += tokens
        self.log_metrics(
            {
                **rollout_metrics(step.groups, step.left_out),
                "group/kept": float(len(step.kept)),
                "group/resampled": float(step.resampled),
                "group/budget_exhausted": float(len(step.kept) < self.config.groups_per_step),
                "group/skipped": float(len(step.skipped)),
                "group/incomplete": float(len(step.incomplete)),
                "group/lost_and_resampled": float(step.lost_groups),
                **fault_metrics(step.groups, step.left_out, step.lost_runners),
                "trajectory/discarded": float(len(step.discarded)),
                **straggler_metrics(step.dropped),
                **staleness_metrics(step.groups, step.weights_version),
                **step.stats.metrics(),
                **(self.progress_made.cold_start.metrics("cold_start") if self.cold_start else {}),
                **recorded,
                "time/rollout_s": sampled - began,
                "time/update_s": updated - sampled,
                "time/sync_s": synced - updated,
                "tokens/sampled": float(tokens),
                "tokens/sampled_lifetime": float(self.progress_made.tokens_lifetime),
                "tokens/sampled_per_s": tokens / (sampled - began),
                "tokens/per_s": tokens / (synced - began),
            }
        )

    def _sample_step(self) -> Step:
        """The next `groups_per_step` usable groups, and more if some are not to be trained on.

        A step that is left in the middle leaves no trace: its tasks come again.
        """
        made = self.progress_made
        before = made.next_position, made.owed_positions
        wanted = self.config.groups_per_step
        total = wanted * self.config.group_size
        try:
            with Progress("rollouts", total, enabled=self.config.progress) as bar:
                progress = RolloutProgress(bar, wanted)
                step = sample_step(
                    lambda count: self._sample_next(count, progress),
                    wanted=wanted,
                    budget=self.config.resample_groups,
                    keeps=self._credit_rule.keeps,
                )
        except Interrupted:
            made.next_position, made.owed_positions = before
            raise
        self.metrics.aggregate(step.runner_metrics, key=ENV_RUNNER_RESULTS)
        return step

    def _sample_next(self, count: int, progress: RolloutProgress) -> Sampled:
        """The next `count` groups: first those that were dropped before, then new ones."""
        made = self.progress_made
        jobs = choose_jobs(
            made.owed_positions,
            made.next_position,
            count,
            self.config.oversample,
            partial(GroupJob, members=self.config.group_size, iteration=self.iteration),
        )
        chosen = {job.position for job in jobs}
        made.next_position = max(made.next_position, max(chosen) + 1)
        progress.begin()
        sampled = sample_groups(
            self.env_runner_group,
            jobs,
            wanted=count,
            restore=lambda: self.restore_env_runners(self.env_runner_group),
            on_progress=progress.show if self.config.progress else None,
            stop=self.stop_requested,
        )
        owed = [p for p in made.owed_positions if p not in chosen]
        made.owed_positions = owed + sorted(sampled.dropped)
        return sampled

    def _update_learners(self, step: Step) -> None:
        """Whole groups to each learner, balanced by tokens."""
        self._learners_turn()
        timesteps = {
            NUM_ENV_STEPS_SAMPLED_LIFETIME: self.metrics.peek(
                (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME), default=0
            )
        }
        updates = self.config.epochs * self.config.mini_batches
        with Progress("update", updates, enabled=self.config.progress) as bar:
            if self.learner_group.is_local:
                data = TrainingData(episodes=step.episodes)
                results = self.learner_group.update(
                    training_data=data, timesteps=timesteps, on_step=lambda done, total: bar.step()
                )
            else:
                refs = [ray.put(shard) for shard in self._shards(step)]
                results = self.learner_group.update(episodes_refs=refs, timesteps=timesteps)
                bar.step(updates)
        self.metrics.aggregate(results, key=LEARNER_RESULTS)
        self._log_learner_metrics()

    def _record(self, step: Step) -> dict[str, float]:
        """Keeps a share of the groups with what the learners made of them."""
        if self._recorder is None:
            return {}
        ask = partial(call_learners, self.learner_group, "learned_credit")
        return self._recorder.record(self._home(), step, self.iteration + 1, ask)

    def _home(self) -> Location:
        """The run's directory: of `rllib train`, of Tune, or RLlib's own."""
        if self.run_directory is None and self._storage:
            path = self._storage.trial_fs_path
            return Location(self._storage.storage_filesystem, path, path)
        return Location.of(self.run_directory or self.logdir)

    def _shards(self, step: Step) -> list[list[Any]]:
        """Balanced by the tokens that are trained on; no learner is left without a group."""
        by_group: dict[int, list[Any]] = {}
        for episode in step.episodes:
            by_group.setdefault(trajectory_of(episode).group_id, []).append(episode)
        learners = self.config.num_learners
        kept = {g.id for g in step.kept}
        dropped = [g for g in step.groups if g.id not in kept]
        shards = zip(
            shard_groups(step.kept, learners),
            reversed(shard_groups(dropped, learners)),
            strict=True,
        )
        return [[e for group in (*k, *d) for e in by_group[group.id]] for k, d in shards]

    def _log_learner_metrics(self) -> None:
        """The learners' own numbers under names of their own, beside RLlib's nested ones."""
        report = self.metrics.peek((LEARNER_RESULTS, DEFAULT_MODULE_ID), default={})
        for name in _LEARNER_METRICS:
            if name in report:
                for path, value in _leaves(report[name], (name,)):
                    self.metrics.log_value(path, value, window=1)

    def sync_weights(self) -> None:
        """Learners -> rollout workers, or the engines that they share."""
        if self.engines is not None:
            self._give_weights_to(self.engines)
        else:
            self.env_runner_group.sync_weights(
                from_worker_or_learner_group=self.learner_group,
                inference_only=True,
                timeout_seconds=None,
            )
        moved = call_learners(self.learner_group, "synced_bytes")[0]
        self.log_metrics({"sync/bytes": float(moved)})

    def _give_weights_to(self, engines: EnginePool) -> None:
        """Once, however many env runners use the engines; those learn the version only."""
        settings = engines.settings
        if self._turns is not None:
            self._turns.weights()
        if settings.weight_transfer == SHARED_MEMORY:
            version, packed = call_learners(self.learner_group, "publish_weights")[0]
            update = engines.update_weights if settings.lora is None else engines.update_adapter
            update(version, packed)
        else:
            with engines.device_update() as members:
                sent = (settings.weight_transfer, engines.name, members, settings.workers)
                version = call_learners(self.learner_group, "send_weights", *sent)[0]
        if self._turns is not None:
            self._turns.engines()
        state = {COMPONENT_RL_MODULE: {}, WEIGHTS_SEQ_NO: version}
        self.env_runner_group.foreach_env_runner(lambda runner: runner.set_state(state))

    def _learners_turn(self) -> None:
        """Engines on the learners' devices sleep until they get weights."""
        if self._turns is not None:
            self._turns.learners()

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Logs numbers under their slash names, each iteration for itself."""
        for name, value in metrics.items():
            self.metrics.log_value(tuple(name.split("/")), value, window=1)

    # Cold start and evaluation.

    def run_cold_start_once(self) -> None:
        """Supervised training before the first RL step, unless a checkpoint has it behind it."""
        made = self.progress_made
        start = self.cold_start
        if start is None or made.cold_start_done:
            return

        self._learners_turn()
        began = time.perf_counter()

        def stop() -> bool:
            pause = self.pause_every_s and time.perf_counter() - began > self.pause_every_s
            return bool(pause) or self._stop_requested

        with Progress(
            "cold start", start.steps, start=made.cold_start.steps, enabled=self.config.progress
        ) as bar:
            try:
                supervise(
                    self.learner_group,
                    self.load_demonstrations(start),
                    start,
                    made.cold_start,
                    start.steps,
                    progress=bar,
                    stop=stop,
                )
            except Interrupted:
                self._stop_requested = False
                raise
        made.cold_start_done = True
        self._demonstrations = None
        self.sync_weights()
        trained = made.cold_start
        curve = " ".join(f"{loss:.3f}" for loss in trained.losses.values())
        best = "" if trained.best_steps is None else f", best after {trained.best_steps} steps"
        seconds = time.perf_counter() - began
        print(
            f"cold start: {trained.steps} steps in {seconds:.0f}s, held-out loss {curve}{best}",
            flush=True,
        )

    def load_demonstrations(self, start: ColdStart) -> Demonstrations:
        """The cold start's data, read once."""
        if self._demonstrations is None:
            env = as_tool_env(self.env_creator(EnvContext(self.config.env_config, worker_index=0)))
            codec = self.config.build_codec()
            env.call_format = codec.call_format
            context: int = call_learners(self.learner_group, "max_context")[0]
            self._demonstrations = load_demonstrations(
                start,
                env,
                codec,
                self.config.seed or 0,
                min(context, self.config.max_tokens or context),
            )
            env.close()
        return self._demonstrations

    def evaluate(self, parallel_train_future: Any = None) -> Any:
        """RLlib's evaluation, after the cold start."""
        self.run_cold_start_once()
        before = self.progress_made.training_done
        if self.eval_env_runner_group is not None:
            # RLlib sends no weights to a runner that has not yet confirmed the ones before.
            self.eval_env_runner_group.fetch_ready_async_reqs(
                tags="set_state", timeout_seconds=None
            )
        results = super().evaluate(parallel_train_future)
        self._evaluated = (before, float(results["accuracy"]))
        return results

    def _run_one_evaluation(self, parallel_train_future: Any = None) -> Any:
        """RLlib's; nothing if a stop is asked for meanwhile, as the iteration has been trained."""
        try:
            return super()._run_one_evaluation(parallel_train_future)
        except Interrupted:
            self._evaluation_left = True
            return {}

    def _held_out_accuracy_now(self) -> float:
        """The accuracy of the current weights; measured only if that has not just been done."""
        if self._evaluated is None or self._evaluated[0] != self.progress_made.training_done:
            self.evaluate()
        assert self._evaluated is not None
        return self._evaluated[1]

    # Hooks of the run loop.

    def request_stop(self) -> None:
        """Asks for an end at the next safe point: between cold-start steps, in the middle of
        rollouts, of which nothing is kept, or after an update."""
        self._stop_requested = True

    def stop_requested(self) -> bool:
        """Whether somebody asked for an end."""
        return self._stop_requested

    def on_run_start(self) -> bool:
        """Cold start, then the accuracy that training starts from; whether anything was done."""
        made = self.progress_made
        before = made.training_done
        self.run_cold_start_once()
        if self.config.evaluation_interval and made.accuracy_before is None:
            made.accuracy_before = self._held_out_accuracy_now()
            print(f"held-out accuracy before RL: {made.accuracy_before:.3f}", flush=True)
        return made.training_done != before

    def on_run_end(self) -> None:
        """The accuracy that training ends with."""
        if self.config.evaluation_interval:
            self.progress_made.accuracy_after = self._held_out_accuracy_now()

    @property
    def held_out_accuracy(self) -> tuple[float, float] | None:
        """Accuracy on the evaluation split before and after training, once both are known."""
        made = self.progress_made
        if made.accuracy_before is None or made.accuracy_after is None:
            return None
        return made.accuracy_before, made.accuracy_after

    summary_line = staticmethod(summary_line)

    # State.

    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> Any:
        """RLlib's state and our own progress."""
        state = super().get_state(components, not_components=not_components, **kwargs)
        state[_STATE] = asdict(self.progress_made)
        return state

    def set_state(self, state: Any) -> None:
        """See `get_state`."""
        super().set_state(state)
        if _STATE in state:
            self.progress_made = ProgressMade.of(state[_STATE])
        if self.engines is not None and COMPONENT_LEARNER_GROUP in state:
            self.sync_weights()

    def save_to_path(self, path: Any = None, *, filesystem: Any = None, **kwargs: Any) -> str:
        """RLlib's; and, if learners hold only parts, the part of each."""
        if self._recorder is not None:
            self._recorder.flush()
        saved: str = super().save_to_path(path, filesystem=filesystem, **kwargs)
        shapes = call_learners(self.learner_group, "weight_shapes")[0]
        write_shapes(str(path or saved), filesystem, shapes)
        if self.config.build_strategy().sharded:
            shards = call_learners(self.learner_group, "save_shards")
            write_shards(str(path or saved), filesystem, shards, self._strategy_record())
        return saved

    def _strategy_record(self) -> dict[str, Any]:
        strategy = self.config.build_strategy()
        record = {"strategy": strategy.name, "learners": self.config.num_learners}
        return record | {k: v for k, v in strategy.chosen.items() if k == "stage"}

    def restore_from_path(
        self, path: Any, *args: Any, component: Any = None, filesystem: Any = None, **kwargs: Any
    ) -> None:
        """RLlib's; learners take their parts, and engines the restored weights."""
        where = {"component": component, "filesystem": filesystem}
        shards = read_shards(str(path), filesystem, self._strategy_record())
        if component is None:
            own = call_learners(self.learner_group, "weight_shapes")[0]
            check_shapes(str(path), filesystem, own)
        super().restore_from_path(path, *args, **where, **kwargs)
        refusal = call_learners(self.learner_group, "why_refused")[0]
        if refusal is not None:
            raise refusal
        if component is None and shards is not None:
            call_learners(self.learner_group, "load_shards", shards)
        if self.engines is not None:
            self.sync_weights()


class GRPO(GTPO):
    """GTPO's machinery with GRPO's credit: a preset."""

    @classmethod
    def get_default_config(cls) -> GRPOConfig:
        """See Algorithm."""
        return GRPOConfig()


def _leaves(tree: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], float]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, (*path, key))]
    return [(path, float(tree))]
