"""Evaluation: whole tasks, sampled by the evaluation runners, as exact means.

On one split its metrics are the evaluation's.  Of several, each has its own under `split/NAME/...`,
and those of the evaluation are over the rollouts of all.  With `samples_per_task` above 1 the
metrics `avg@k`, `pass@k` and `maj@k` say more than the accuracy; see rllib_gtpo.at_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from ray.rllib.env.env_context import EnvContext
from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EVALUATION_RESULTS
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_gtpo.at_k import compute_at_k
from rllib_gtpo.checks import evaluation_splits
from rllib_gtpo.episodes import groups_of
from rllib_gtpo.errors import ConfigError, DataError, Interrupted
from rllib_gtpo.group_rollout import GroupJob
from rllib_gtpo.metrics import rollout_metrics
from rllib_gtpo.progress import Progress, RolloutProgress
from rllib_gtpo.sampling import Sampled, refuse_broken_environment, sample_groups
from rllib_gtpo.text_env import as_tool_env


def evaluate_split(algorithm: Any, runners: Any) -> tuple[dict[str, Any], int, int]:
    """RLlib's custom evaluation function: up to `evaluation_duration` trajectories of each split.

    The tasks and the sampler's keys are the same at every evaluation, so differences are the
    policy's.  `weights/version` says which weights were evaluated: as of training's own versions,
    and with `evaluation_parallel_to_training` those that the iteration starts with.
    """
    if runners is None:
        raise ConfigError(
            "evaluate() needs runners: set evaluation(evaluation_interval=...) or "
            "evaluation(evaluation_num_env_runners=...)."
        )
    config = algorithm.evaluation_config
    sampled = sample_while_training(
        lambda: sample_splits(algorithm, runners), algorithm.train_meanwhile
    )
    env = as_tool_env(algorithm.env_creator(EnvContext(config.env_config, worker_index=0)))
    metrics: dict[str, float] = {}
    for split, part in sampled.items():
        groups = groups_of(part.episodes)
        refuse_broken_environment(groups, part.discarded)
        own = rollout_metrics(groups, part.discarded) | compute_at_k(groups, env.same_answer)
        own["weights/version"] = float(part.weights_version)
        of = "" if len(sampled) == 1 else f"split/{split}/"
        metrics |= {of + name: value for name, value in own.items()}
    env.close()
    parts = list(sampled.values())
    if len(sampled) > 1:
        groups = [group for part in parts for group in groups_of(part.episodes)]
        metrics |= rollout_metrics(groups, [t for part in parts for t in part.discarded])
        metrics["weights/version"] = float(parts[0].weights_version)
    _log(algorithm, metrics, parts)
    steps = sum(len(episode) for part in parts for episode in part.episodes)
    return dict(metrics), steps, steps


def sample_splits(algorithm: Any, runners: Any) -> dict[str, Sampled]:
    """The rollouts of an evaluation, by split."""
    config = algorithm.evaluation_config
    splits = evaluation_splits(config)
    tasks = max(1, config.evaluation_duration // config.evaluation_samples_per_task)
    rollouts = len(splits) * tasks * config.evaluation_samples_per_task
    with Progress("evaluation", rollouts, enabled=config.progress) as bar:
        progress = RolloutProgress(bar, len(splits) * tasks)
        return {split: _sample(algorithm, runners, split, tasks, progress) for split in splits}


def sample_while_training(
    sample: Callable[[], dict[str, Sampled]], train: Callable[[], None] | None
) -> dict[str, Sampled]:
    """`sample()`, in a thread of its own while `train()` runs in this one, if there is that.

    The runners that sample have got the weights before, and `train` gives them no others: so the
    result is that of the weights before the training, whichever of both takes longer.  Training
    stays in the thread that it is in without this, whose number of torch threads, child processes
    and metrics are not another's.
    """
    if train is None:
        return sample()
    executor = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
    sampling = executor.submit(sample)
    try:
        train()
        return sampling.result()
    except Interrupted:
        wait([sampling])  # it has been asked to stop, too
        raise
    finally:
        executor.shutdown(wait=False)  # an error or Ctrl-C is not to wait for rollouts


def _sample(
    algorithm: Any, runners: Any, split: str, tasks: int, progress: RolloutProgress
) -> Sampled:
    config = algorithm.evaluation_config
    members = config.evaluation_samples_per_task
    progress.begin()
    sampled = sample_groups(
        runners,
        [GroupJob(position, members, 0, split) for position in range(tasks)],
        restore=lambda: algorithm.restore_env_runners(runners),
        on_progress=progress.show if config.progress else None,
        stop=algorithm.stop_requested,
    )
    if not sampled.episodes:
        reason = next(iter(sampled.skipped.values()), "")
        raise DataError(f"evaluation has no usable task in {split!r}: {reason}")
    return sampled


def _log(algorithm: Any, metrics: dict[str, float], sampled: Iterable[Sampled]) -> None:
    logger = MetricsLogger(root=False)
    for name, value in metrics.items():
        logger.log_value(tuple(name.split("/")), value, window=1)
    algorithm.metrics.aggregate([logger.reduce()], key=EVALUATION_RESULTS)
    algorithm.metrics.aggregate(
        [result for part in sampled for result in part.runner_metrics],
        key=(EVALUATION_RESULTS, ENV_RUNNER_RESULTS),
    )
