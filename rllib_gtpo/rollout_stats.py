"""What a runner counts while it rolls out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from rllib_gtpo.types import Group, Trajectory

_LAST = 0.1  # the share of trajectories whose wait counts as one for stragglers


@dataclass
class Tally:
    """How far a call to sample groups has come."""

    trajectories: int = 0
    groups: int = 0
    tokens: int = 0  # that the policy sampled

    @classmethod
    def of(cls, groups: Iterable[Group]) -> Tally:
        """That of finished groups."""
        tally = cls()
        for group in groups:
            tally.groups += 1
            for trajectory in group.trajectories:
                tally.add_trajectory(trajectory)
        return tally

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.trajectories + other.trajectories,
            self.groups + other.groups,
            self.tokens + other.tokens,
        )

    def add_trajectory(self, trajectory: Trajectory) -> None:
        """One has ended."""
        self.trajectories += 1
        self.tokens += trajectory.num_trained_tokens

    def remove_trajectory(self) -> None:
        """One that had ended is rolled out again; its tokens were sampled all the same."""
        self.trajectories -= 1


@dataclass
class RolloutStats:
    """Counters of one call on one runner, or of several together."""

    in_flight_peak: int = 0  # most trajectories open at one time on one runner
    straggler_wait_s: float = 0.0  # longest wait for the last tenth of a call's trajectories
    engine_retries: int = 0  # requests that were sent again since the engine failed
    turns: int = 0
    overhead_s: float = 0.0  # CPU time of the runner's thread between engine and environment
    _ended: list[float] = field(default_factory=list)

    def trajectory_ended(self, trajectory: Trajectory) -> None:
        """A trajectory has come to its end."""
        self._ended.append(time.monotonic())
        self.turns += len(trajectory.turns)

    def finish(self) -> None:
        """The call is over."""
        if self._ended:
            most = max(int((1 - _LAST) * len(self._ended)) - 1, 0)
            self.straggler_wait_s = self._ended[-1] - self._ended[most]
        self._ended = []

    def add(self, other: RolloutStats) -> None:
        """Takes in another call's."""
        self.in_flight_peak = max(self.in_flight_peak, other.in_flight_peak)
        self.straggler_wait_s = max(self.straggler_wait_s, other.straggler_wait_s)
        self.engine_retries += other.engine_retries
        self.turns += other.turns
        self.overhead_s += other.overhead_s

    def metrics(self) -> dict[str, float]:
        """Under their stable names."""
        return {
            "rollout/in_flight_peak": float(self.in_flight_peak),
            "rollout/straggler_wait_s": self.straggler_wait_s,
            "rollout/engine_retries": float(self.engine_retries),
            "rollout/overhead_per_turn_ms": 1000 * self.overhead_s / max(self.turns, 1),
        }
