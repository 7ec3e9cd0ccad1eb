"""Groups on their way: which trajectory runs when, and what becomes of a group when its last member
has ended.

At most `max_concurrency` trajectories are open at a time; an environment is made when its turn has
come and closed when its trajectory ends.  A finished group is scored and handed on at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_gtpo.aio import run_coroutine
from rllib_gtpo.env import task_id
from rllib_gtpo.interruption import Stop, unless_stopped
from rllib_gtpo.rollout import Rollout
from rllib_gtpo.rollout_stats import RolloutStats, Tally
from rllib_gtpo.types import StopReason, Trajectory

if TYPE_CHECKING:
    from rllib_gtpo.env_runner import GTPOEnvRunner

ATTEMPTS = 3  # to roll out a member whose environment or engine breaks


@dataclass
class GroupJob:
    """A group to roll out.

    position: index into the endless, seeded stream of tasks; also the group's id.
    members: how many trajectories.  iteration: part of the sampler's key.
    split: where the task is; None: the training split, or the first one of an evaluation.
    must_finish: it is never dropped as a straggler, since it was before.
    """

    position: int
    members: int
    iteration: int
    split: str | None = None
    must_finish: bool = False


@dataclass
class Outcome:
    """The episodes of complete groups, and what became of the others.

    skipped: Position -> why its task cannot be rolled out at all.
    incomplete: Position -> what broke members, again and again.
    discarded: Rollouts that broke and were rolled out again, and those of incomplete groups.
    dropped: Position -> the members, as far as they came, of a group that others were faster than.
    weights_version: The newest that a runner knew of.
    """

    episodes: list[SingleAgentEpisode] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)
    incomplete: dict[int, str] = field(default_factory=dict)
    discarded: list[Trajectory] = field(default_factory=list)
    dropped: dict[int, list[Trajectory]] = field(default_factory=dict)
    stats: RolloutStats = field(default_factory=RolloutStats)
    weights_version: int = 0


@dataclass
class Rollouts(Outcome):
    """What a runner gives back."""

    failure: Exception | None = None  # what went wrong, if the runner itself could not go on


@dataclass(eq=False)
class GroupRollout:
    """One group: the newest rollout of each member, and how it stands."""

    job: GroupJob
    members: list[Rollout | None]
    waiting_for: int  # members that are on their way, their rewards included, or still to come
    attempt: int = 0
    over: bool = False  # handed on, or given up for one reason or another
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def rollouts(self) -> list[Rollout]:
        """Those that have started."""
        return [member for member in self.members if member is not None]

    def broken_members(self) -> list[int]:
        """Those to roll out again: not where most of the group's environments broke, which is the
        task's doing.  What the engine broke says nothing about the task."""
        trajectories = [rollout.trajectory for rollout in self.rollouts]
        engine = [t.member for t in trajectories if t.stop_reason is StopReason.ENGINE_ERROR]
        broken = [t.member for t in trajectories if t.broken and t.member not in engine]
        sound = sum(not t.broken for t in trajectories)
        again = engine + (broken if len(broken) <= sound else [])
        return sorted(again) if self.attempt + 1 < ATTEMPTS else []


class GroupScheduler:
    """Rolls out groups on one runner.

    wanted: With fewer than there are jobs, the slowest groups are dropped: as soon as those that
        are finished and those that must finish are enough.
    on_group: Takes the episodes of each group when it is finished and scored.
    stop: Whether somebody has asked for a stop, at which everything is given up.
    """

    def __init__(
        self,
        runner: GTPOEnvRunner,
        jobs: Sequence[GroupJob],
        out: Rollouts,
        wanted: int | None,
        *,
        on_group: Callable[[GroupJob, list[SingleAgentEpisode]], None],
        on_progress: Callable[[Tally], None] | None,
        stop: Stop = lambda: False,
    ) -> None:
        self._runner, self._out, self._stop = runner, out, stop
        self._limit: int = runner.config.max_concurrency
        self._on_group, self._on_progress = on_group, on_progress or (lambda tally: None)
        self._groups = [GroupRollout(job, [None] * job.members, job.members) for job in jobs]
        self._queue = deque((group, m) for group in self._groups for m in range(group.job.members))
        self._wanted = wanted if wanted is not None and wanted < len(jobs) else None
        self._must_finish = [group for group in self._groups if group.job.must_finish]
        self._tally = Tally()
        self._open: dict[Rollout, GroupRollout] = {}  # in the order in which they were opened
        self._running: set[asyncio.Task[None]] = set()

    def run(self) -> None:
        """Returns when every group is handed on or given up.

        Raises:
            Interrupted: A stop was asked for before that.
        """
        in_step = self._runner.config.deterministic
        work = self._run_in_step() if in_step else self._run_freely()
        run_coroutine(unless_stopped(work, self._stop))
        for group in self._groups:
            if group.job.position in self._out.dropped:
                for rollout in group.rollouts:
                    rollout.drop()
                dropped = [rollout.trajectory for rollout in group.rollouts]
                self._out.dropped[group.job.position] = dropped
        self._out.stats.finish()

    # Freely: each trajectory is a task of its own, and holds up nobody else.

    async def _run_freely(self) -> None:
        self._finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self._drop_stragglers()
            self._fill()
            await self._finished
        finally:
            running = list(self._running)
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _fill(self) -> None:
        """Starts trajectories while there is room."""
        while len(self._running) < self._limit and (slot := self._next()) is not None:
            group, member = slot
            task = asyncio.get_running_loop().create_task(self._run(group, member))
            self._running.add(task)
            group.tasks.add(task)
            task.add_done_callback(group.tasks.discard)
            task.add_done_callback(self._task_ended)
        if not self._running and not self._finished.done():
            self._finished.set_result(None)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        error = None if task.cancelled() else task.exception()
        if self._finished.done():
            return
        if error is not None:
            self._finished.set_exception(error)
        else:
            self._fill()

    async def _run(self, group: GroupRollout, member: int) -> None:
        rollout = self._new(group, member)
        if rollout is None:
            return
        try:
            if not self._starts(group, rollout):
                return
            while not group.over and (completion := await rollout.sample()) is not None:
                await rollout.take(completion)
        finally:
            self._close(rollout)
        await self._member_ended(group, rollout)

    # In step: all trajectories turn by turn in a fixed order, so that batches and sums repeat bit
    # for bit.

    async def _run_in_step(self) -> None:
        try:
            while self._fill_in_step():
                live = list(self._open.items())
                completions = await asyncio.gather(*(rollout.sample() for rollout, _ in live))
                for (rollout, _), completion in zip(live, completions, strict=True):
                    if completion is not None:
                        await rollout.take(completion)
                for rollout, group in live:
                    if rollout.done:
                        self._close(rollout)
                        await self._member_ended(group, rollout)
        finally:
            for rollout in list(self._open):
                self._close(rollout)

    def _fill_in_step(self) -> bool:
        """Starts trajectories while there is room; whether any is open."""
        while len(self._open) < self._limit and (slot := self._next()) is not None:
            group, member = slot
            rollout = self._new(group, member)
            if rollout is not None and not self._starts(group, rollout):
                self._close(rollout)
        return bool(self._open)

    # Both.

    def _next(self) -> tuple[GroupRollout, int] | None:
        while self._queue:
            group, member = self._queue.popleft()
            if not group.over:
                return group, member
        return None

    def _new(self, group: GroupRollout, member: int) -> Rollout | None:
        """A rollout of the member, if the group needs it and has a task."""
        if group.over:
            return None
        made = self._runner.new_rollout(group.job, member, group.attempt, self._out.stats)
        if isinstance(made, str):
            self._skip(group, made)
            return None
        group.members[member] = made
        self._open[made] = group
        stats = self._out.stats
        stats.in_flight_peak = max(stats.in_flight_peak, len(self._open))
        return made

    def _starts(self, group: GroupRollout, rollout: Rollout) -> bool:
        """False if its start shows that the group's task cannot be rolled out at all."""
        reason = rollout.open()
        if reason is None or rollout.trajectory.member or group.attempt:
            return True
        self._skip(group, reason)
        return False

    def _skip(self, group: GroupRollout, reason: str) -> None:
        group.over = True
        self._out.skipped[group.job.position] = reason

    def _close(self, rollout: Rollout) -> None:
        del self._open[rollout]
        rollout.close()

    async def _member_ended(self, group: GroupRollout, rollout: Rollout) -> None:
        self._out.stats.trajectory_ended(rollout.trajectory)
        self._tally.add_trajectory(rollout.trajectory)
        self._on_progress(self._tally)
        group.waiting_for -= 1
        if group.over or group.waiting_for:
            return
        again = group.broken_members()
        if again:
            self._roll_out_again(group, again)
            return
        trajectories = [r.trajectory for r in group.rollouts]
        broken = [t for t in trajectories if t.broken]
        if broken and not self._runner.config.in_evaluation:
            self._give_up(group, trajectories, broken[0])
            return
        episodes = await self._runner.score_group(group.rollouts)
        if group.over:  # dropped while it was being scored
            return
        group.over = True
        self._tally.groups += 1
        self._on_progress(self._tally)
        self._on_group(group.job, episodes)
        group.members = []
        self._drop_stragglers()

    def _roll_out_again(self, group: GroupRollout, again: list[int]) -> None:
        """Puts new rollouts in the place of broken ones, ahead of all that have not started."""
        for member in again:
            rollout = group.members[member]
            assert rollout is not None
            self._out.discarded.append(rollout.trajectory)
            self._tally.remove_trajectory()
            group.members[member] = None
        group.attempt += 1
        group.waiting_for = len(again)
        self._queue.extendleft((group, member) for member in reversed(again))

    def _give_up(
        self, group: GroupRollout, trajectories: list[Trajectory], broken: Trajectory
    ) -> None:
        """A group with a broken member: the others would be compared with a failure that is not
        the policy's."""
        group.over = True
        reason = f"task {task_id(broken.task)}: member {broken.member} ended in"
        self._out.incomplete[group.job.position] = f"{reason} {broken.stop_reason}: {broken.error}"
        self._out.discarded += trajectories

    def _drop_stragglers(self) -> None:
        """Gives up what is not needed any more."""
        if self._wanted is None:
            return
        owed = sum(not group.over for group in self._must_finish)
        if self._tally.groups + owed < self._wanted:
            return
        current = asyncio.current_task()
        for group in self._groups:
            if not group.over and not group.job.must_finish:
                group.over = True
                self._out.dropped[group.job.position] = []
                for task in group.tasks:
                    if task is not current:
                        task.cancel()
