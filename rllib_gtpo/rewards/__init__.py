"""Turn rewards."""

from rllib_gtpo.rewards.rubric import Rubric

__all__ = ["Rubric"]
