"""Sampling groups over a set of env runners, of which some may die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rllib_gtpo.env_runner import GroupJob, Rollouts
from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.errors import EnvironmentFault
from rllib_gtpo.types import Group, StopReason

_MAX_ROUNDS = 5


@dataclass
class Sampled:
    """Episodes of whole groups in the order of their jobs; tasks that could not be used; losses."""

    episodes: list[Any] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    runner_metrics: list[Any] = field(default_factory=list)
    lost_groups: int = 0


def sample_groups(
    runners: Any,
    jobs: Sequence[GroupJob],
    *,
    restore: Callable[[], Any],
    on_trajectory: Callable[[int], None] = lambda count: None,
) -> Sampled:
    """Rolls out every job; those of a runner that died are given to the others.

    runners: RLlib's EnvRunnerGroup.  restore: brings dead runners back.
    """
    sampled = Sampled()
    if runners.num_remote_workers() == 0:
        local = runners.local_env_runner
        _collect(sampled, local.sample_groups(jobs, lambda: on_trajectory(1)), local.get_metrics())
        return sampled
    pending = list(jobs)
    for attempt in range(_MAX_ROUNDS):
        if attempt:
            sampled.lost_groups += len(pending)
            restore()
        done = _round(runners, pending, sampled, on_trajectory)
        pending = [job for job in pending if job.position not in done]
        if not pending:
            order = {job.position: index for index, job in enumerate(jobs)}
            sampled.episodes.sort(key=lambda e: order[trajectory_of(e).group_id])
            return sampled
    raise EnvironmentFault(
        f"{len(pending)} of {len(jobs)} groups could not be sampled in {_MAX_ROUNDS} attempts: "
        "env runners "
        "keep dying. Their logs say why (ray logs); memory is the usual reason: lower "
        "max_concurrency."
    )


def _round(
    runners: Any, jobs: list[GroupJob], sampled: Sampled, on_trajectory: Callable[[int], None]
) -> set[int]:
    """One call to each healthy runner; returns the positions that are done with."""
    ids = runners.healthy_worker_ids()[: len(jobs)]
    if not ids:
        return set()
    shares = [jobs[index :: len(ids)] for index in range(len(ids))]

    def call(share: list[GroupJob]) -> Callable[[Any], Any]:
        return lambda runner: (runner.try_sample_groups(share), runner.get_metrics())

    results = runners.foreach_env_runner(
        [call(share) for share in shares], local_env_runner=False, remote_worker_ids=ids
    )
    done: set[int] = set()
    for rollouts, metrics in results:
        _collect(sampled, rollouts, metrics)
        on_trajectory(len(rollouts.episodes))
        done |= {trajectory_of(e).group_id for e in rollouts.episodes}
        done |= set(rollouts.skipped)
    return done


def _collect(sampled: Sampled, rollouts: Rollouts, metrics: Any) -> None:
    if rollouts.failure is not None:
        raise rollouts.failure
    sampled.episodes += rollouts.episodes
    sampled.skipped.update(rollouts.skipped)
    sampled.runner_metrics.append(metrics)


def refuse_broken_environment(groups: list[Group]) -> None:
    """One broken rollout is data; an environment that breaks most of them is a bug to be told."""
    trajectories = [t for g in groups for t in g.trajectories]
    broken = [
        t for t in trajectories if t.stop_reason in (StopReason.ENV_ERROR, StopReason.ENV_TIMEOUT)
    ]
    if 2 * len(broken) > len(trajectories):
        raise EnvironmentFault(
            f"{len(broken)} of {len(trajectories)} rollouts ended in an error of the "
            "environment. The "
            f"first: {broken[0].error}"
        )
