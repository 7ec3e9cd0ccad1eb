"""Evaluation on a split: whole tasks, sampled by the evaluation runners, as exact means."""

from __future__ import annotations

from typing import Any

from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS, EVALUATION_RESULTS
from ray.rllib.utils.metrics.metrics_logger import MetricsLogger

from rllib_gtpo.env_runner import GroupJob
from rllib_gtpo.episodes import groups_of
from rllib_gtpo.errors import ConfigError, DataError
from rllib_gtpo.metrics import rollout_metrics
from rllib_gtpo.progress import Progress
from rllib_gtpo.sampling import refuse_broken_environment, sample_groups


def evaluate_split(algorithm: Any, runners: Any) -> tuple[dict[str, Any], int, int]:
    """RLlib's custom evaluation function: up to `evaluation_duration` trajectories of the
    split.

    The tasks and the sampler's keys are the same at every evaluation, so differences are the
    policy's.
    """
    if runners is None:
        raise ConfigError(
            "evaluate() needs runners: set evaluation(evaluation_interval=...) or "
            "evaluation(evaluation_num_env_runners=...)."
        )
    config = algorithm.evaluation_config
    members = config.evaluation_samples_per_task
    tasks = max(1, config.evaluation_duration // members)
    jobs = [GroupJob(position, members, 0) for position in range(tasks)]
    with Progress("evaluation", len(jobs) * members, enabled=config.progress) as bar:
        sampled = sample_groups(
            runners,
            jobs,
            restore=lambda: algorithm.restore_env_runners(runners),
            on_trajectory=bar.step,
        )
    if not sampled.episodes:
        raise DataError(
            f"evaluation has no usable task: {next(iter(sampled.skipped.values()), '')}"
        )
    groups = groups_of(sampled.episodes)
    refuse_broken_environment(groups, sampled.discarded)
    metrics = rollout_metrics(groups, sampled.discarded)
    logger = MetricsLogger(root=False)
    for name, value in metrics.items():
        logger.log_value(tuple(name.split("/")), value, window=1)
    algorithm.metrics.aggregate([logger.reduce()], key=EVALUATION_RESULTS)
    algorithm.metrics.aggregate(
        sampled.runner_metrics, key=(EVALUATION_RESULTS, ENV_RUNNER_RESULTS)
    )
    steps = sum(len(episode) for episode in sampled.episodes)
    return dict(metrics), steps, steps
