import pytest

from rllib_gtpo.rewards.overlong import OverlongPenalty
from rllib_gtpo.types import Trajectory, Turn


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1, 0.0), (80, 0.0), (81, -0.025), (90, -0.25), (100, -0.5), (120, -0.5)],
)
def test_by_hand(tokens, expected):
    """100 tokens at most, the last 20 of which cost up to 0.5; context counts as well."""
    first, last = Turn(0, [0], []), Turn(1, [], [0] * (tokens - 1), rewards={"accuracy": 1.0})
    OverlongPenalty(limit=100, buffer=20, penalty=0.5).score(Trajectory({}, turns=[first, last]))
    assert last.rewards == {"accuracy": 1.0, "overlong": pytest.approx(expected)}
    assert first.rewards == {}


def test_a_trajectory_without_turns_has_nothing_to_punish():
    empty = Trajectory({})
    OverlongPenalty(limit=100, buffer=20, penalty=0.5).score(empty)
    assert empty == Trajectory({})
