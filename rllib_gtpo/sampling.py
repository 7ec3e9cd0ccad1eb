"""Sampling groups over a set of env runners, of which some may die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rllib_gtpo.env_runner import GroupJob, Rollouts
from rllib_gtpo.episodes import groups_of, trajectory_of
from rllib_gtpo.errors import DataError, EnvironmentFault
from rllib_gtpo.types import Group, Trajectory

_MAX_ROUNDS = 5
_MAX_SKIPPED_FRAC = 10  # give up after this many times the wanted groups could not be used


@dataclass
class Sampled:
    """Episodes of whole groups in the order of their jobs; what could not be used (see `Rollouts`);
    groups lost with a runner."""

    episodes: list[Any] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    incomplete: dict[int, str] = field(default_factory=dict)
    discarded: list[Trajectory] = field(default_factory=list)
    runner_metrics: list[Any] = field(default_factory=list)
    lost_groups: int = 0

    def add(self, other: Rollouts | Sampled) -> None:
        """Takes in what was sampled besides."""
        self.episodes += other.episodes
        self.skipped.update(other.skipped)
        self.incomplete.update(other.incomplete)
        self.discarded += other.discarded


@dataclass
class Step(Sampled):
    """What one iteration samples.

    groups: The complete ones, of `episodes`.
    kept: Those of them that are trained on.
    resampled: How many were sampled in place of those that are not.
    """

    groups: list[Group] = field(default_factory=list)
    kept: list[Group] = field(default_factory=list)
    resampled: int = 0


def sample_step(
    sample_next: Callable[[int], Sampled],
    *,
    wanted: int,
    budget: int,
    keeps: Callable[[Group], bool],
) -> Step:
    """Samples `wanted` groups, and up to `budget` more until `wanted` ones are kept.

    sample_next: Samples the next so many tasks.  Those that cannot be used, and groups that stay
        incomplete, are replaced without being counted as part of the budget.
    """
    step = Step()
    target = wanted
    while (missing := target - len(step.groups)) > 0:
        sampled = sample_next(missing)
        step.add(sampled)
        step.lost_groups += sampled.lost_groups
        groups = groups_of(sampled.episodes)
        step.groups += groups
        step.kept += filter(keeps, groups)
        refuse_broken_environment(step.groups, step.discarded)
        useless = {**step.skipped, **step.incomplete}
        if len(useless) > _MAX_SKIPPED_FRAC * wanted:
            raise DataError(f"no usable tasks; the last: {list(useless.values())[-1]}")
        if len(step.groups) == target:
            step.resampled = target - wanted
            target += max(0, min(wanted - len(step.kept), budget - step.resampled))
    return step


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
        done |= {*rollouts.skipped, *rollouts.incomplete}
    return done


def _collect(sampled: Sampled, rollouts: Rollouts, metrics: Any) -> None:
    if rollouts.failure is not None:
        raise rollouts.failure
    sampled.add(rollouts)
    sampled.runner_metrics.append(metrics)


def refuse_broken_environment(groups: list[Group], discarded: list[Trajectory]) -> None:
    """One broken rollout is data; an environment that breaks most of them is a bug to be told."""
    trajectories = [t for g in groups for t in g.trajectories] + discarded
    broken = [t for t in trajectories if t.broken]
    if 2 * len(broken) > len(trajectories):
        raise EnvironmentFault(
            f"{len(broken)} of {len(trajectories)} rollouts ended in an error of the "
            "environment. The "
            f"first: {broken[0].error}"
        )
