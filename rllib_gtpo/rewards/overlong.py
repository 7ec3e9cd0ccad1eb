"""DAPO's soft overlong punishment (arXiv 2503.14476): long rollouts lose reward gradually.

With L = most tokens of a trajectory and B = the buffer, a trajectory of n tokens gets

    overlong = -penalty * clamp((n - (L - B)) / B, 0, 1)

on its last turn, so that the one that just fits is told apart from the one that was cut off.
"""

from __future__ import annotations

from dataclasses import dataclass

from rllib_gtpo.rewards.rubric import merge_components
from rllib_gtpo.types import Trajectory

OVERLONG = "overlong"


@dataclass(frozen=True)
class OverlongPenalty:
    """Adds the component "overlong" to finished trajectories.

    limit: Most tokens of a trajectory; prompt and tool output count, as they do for max_tokens.
    buffer: How many tokens before the limit the penalty starts to grow.
    penalty: What reaching the limit costs.
    """

    limit: int
    buffer: int
    penalty: float

    def score(self, trajectory: Trajectory) -> None:
        """Adds the component to the last turn; call it once, when the trajectory ended."""
        if trajectory.turns:
            over = (trajectory.num_tokens - (self.limit - self.buffer)) / self.buffer
            component = {OVERLONG: -self.penalty * min(1.0, max(0.0, over))}
            merge_components(trajectory.turns[-1].rewards, component, OVERLONG)
