"""Sampling groups over a set of env runners, of which some may die."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rllib_gtpo.episodes import groups_of, trajectory_of
from rllib_gtpo.errors import DataError, EngineError, EnvironmentFault
from rllib_gtpo.group_rollout import GroupJob, Outcome, Rollouts
from rllib_gtpo.interruption import Stop, call_each
from rllib_gtpo.remote_progress import remote_tallies
from rllib_gtpo.rollout_stats import Tally
from rllib_gtpo.types import Group, StopReason, Trajectory

_MAX_ROUNDS = 5
_MAX_SKIPPED_FRAC = 10  # give up after this many times the wanted groups could not be used


@dataclass
class Sampled(Outcome):
    """What all runners gave back, in the order of the jobs; groups lost with runners that died."""

    runner_metrics: list[Any] = field(default_factory=list)
    lost_groups: int = 0
    lost_runners: int = 0

    @property
    def left_out(self) -> list[Trajectory]:
        """All rollouts that are not among the episodes."""
        return self.discarded + [t for members in self.dropped.values() for t in members]

    def add(self, other: Outcome) -> None:
        """Takes in what was sampled besides."""
        self.episodes += other.episodes
        self.skipped.update(other.skipped)
        self.incomplete.update(other.incomplete)
        self.discarded += other.discarded
        for position, members in other.dropped.items():
            self.dropped.setdefault(position, []).extend(members)
        self.stats.add(other.stats)
        self.weights_version = max(self.weights_version, other.weights_version)


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
        step.lost_runners += sampled.lost_runners
        step.runner_metrics += sampled.runner_metrics
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


def choose_jobs(
    owed: Sequence[int], first: int, count: int, oversample: float, job: Callable[..., GroupJob]
) -> list[GroupJob]:
    """The groups that a step rolls out to have `count` of them.

    Those that it owes to earlier steps go first and must finish.  Of the others, which may be
    dropped, there are more than needed by the share `oversample`.

    Args:
        owed: Positions of tasks that were dropped.
        first: The first position of new tasks.
        job: Makes one of a position and `must_finish`.
    """
    again = [job(position, must_finish=True) for position in owed[:count]]
    new = math.ceil((count - len(again)) * (1 + oversample))
    return again + [job(position, must_finish=False) for position in range(first, first + new)]


def sample_groups(
    runners: Any,
    jobs: Sequence[GroupJob],
    *,
    restore: Callable[[], Any],
    wanted: int | None = None,
    on_progress: Callable[[Tally], None] | None = None,
    stop: Stop = lambda: False,
) -> Sampled:
    """Rolls out the jobs; those of a runner that died are given to the others.

    runners: RLlib's EnvRunnerGroup.  restore: brings dead runners back.  wanted: How many are
    needed, if not all; each runner drops its own share of the slowest.  on_progress: Called now and
    then with how far all runners are.  stop: Asked now and then whether to raise Interrupted.
    """
    sampled = Sampled()
    needed = len(jobs) if wanted is None else wanted
    if runners.num_remote_workers() == 0:
        local = runners.local_env_runner
        rollouts = local.sample_groups(jobs, wanted=needed, on_progress=on_progress, stop=stop)
        _collect(sampled, rollouts, local.get_metrics())
        return sampled
    pending = list(jobs)
    for attempt in range(_MAX_ROUNDS):
        if attempt:
            sampled.lost_groups += len(pending)
            restore()
        finished = len(groups_of(sampled.episodes))
        done = _round(runners, pending, max(needed - finished, 0), sampled, on_progress, stop)
        pending = [job for job in pending if job.position not in done]
        if not pending:
            order = {job.position: index for index, job in enumerate(jobs)}
            sampled.episodes.sort(key=lambda e: order[trajectory_of(e).group_id])
            return sampled
    raise EnvironmentFault(
        f"{len(pending)} of {len(jobs)} groups could not be sampled in {_MAX_ROUNDS} attempts: env "
        "runners keep dying. Their logs say why (ray logs); memory is the usual reason: lower "
        "max_concurrency."
    )


def _round(
    runners: Any,
    jobs: list[GroupJob],
    needed: int,
    sampled: Sampled,
    on_progress: Callable[[Tally], None] | None,
    stop: Stop,
) -> set[int]:
    """One call to each healthy runner; returns the positions that are done with.

    It is made when all have the weights that were sent to them, or are known to have failed: RLlib
    does not look at what becomes of these calls, and on a busy machine a later one has been served
    without.
    """
    runners.fetch_ready_async_reqs(tags="set_state", timeout_seconds=None)
    ids = runners.healthy_worker_ids()[: max(needed, 1)]
    if not ids:
        return set()
    count = len(ids)
    shares = [jobs[index::count] for index in range(count)]
    parts = [needed // count + (index < needed % count) for index in range(count)]
    local = runners.local_env_runner  # it has got the same weights
    version = 0 if local is None else local.weights_version

    def call(
        share: list[GroupJob], part: int, report: Callable[[Tally], None] | None
    ) -> Callable[[Any], Any]:
        return lambda runner: (
            runner.try_sample_groups(share, part, report, version),
            runner.get_metrics(),
        )

    with remote_tallies(count, Tally.of(groups_of(sampled.episodes)), on_progress) as reports:
        calls = [call(*each) for each in zip(shares, parts, reports, strict=True)]
        results = call_each(runners, calls, ids, stop)
    sampled.lost_runners += count - len(results)
    done: set[int] = set()
    for rollouts, metrics in results:
        _collect(sampled, rollouts, metrics)
        done |= {trajectory_of(e).group_id for e in rollouts.episodes}
        done |= {*rollouts.skipped, *rollouts.incomplete, *rollouts.dropped}
    if on_progress is not None:
        on_progress(Tally.of(groups_of(sampled.episodes)))
    return done


def _collect(sampled: Sampled, rollouts: Rollouts, metrics: Any) -> None:
    if rollouts.failure is not None:
        raise rollouts.failure
    sampled.add(rollouts)
    sampled.runner_metrics.append(metrics)


def refuse_broken_environment(groups: list[Group], discarded: list[Trajectory]) -> None:
    """One broken rollout is data; an environment or an engine that breaks most of them is to be
    told."""
    trajectories = [t for g in groups for t in g.trajectories] + discarded
    broken = [t for t in trajectories if t.broken]
    if 2 * len(broken) <= len(trajectories):
        return
    engine = [t for t in broken if t.stop_reason is StopReason.ENGINE_ERROR]
    if 2 * len(engine) > len(broken):
        raise EngineError(
            f"{len(engine)} of {len(trajectories)} rollouts ended in an error of the engine, each "
            f"after several attempts. The first: {engine[0].error}"
        )
    raise EnvironmentFault(
        f"{len(broken)} of {len(trajectories)} rollouts ended in an error of the environment. The "
        f"first: {broken[0].error}"
    )
