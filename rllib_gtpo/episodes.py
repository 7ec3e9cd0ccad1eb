"""The one place that turns rollouts into RLlib episodes and episodes into rollouts.

An episode is RLlib's SingleAgentEpisode with one env step per turn: observations are
`Observation`s, actions are the turns' texts, rewards are the summed turn rewards.  The typed
`Trajectory` travels in the episode's `custom_data`, which survives pickling (not slicing: episodes
are never sliced here).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.rllib.env.single_agent_episode import SingleAgentEpisode

from rllib_gtpo.errors import GTPOError
from rllib_gtpo.types import Group, Trajectory

_TRAJECTORY = "trajectory"


def attach_trajectory(episode: SingleAgentEpisode, trajectory: Trajectory) -> None:
    """Stores the typed view with the episode, and makes the episode's rewards the turns'
    rewards."""
    episode.custom_data[_TRAJECTORY] = trajectory
    if trajectory.turns:
        episode.set_rewards(new_data=[turn.reward for turn in trajectory.turns])


def trajectory_of(episode: SingleAgentEpisode) -> Trajectory:
    """The typed view of an episode."""
    if _TRAJECTORY not in episode.custom_data:
        raise GTPOError(
            f"Episode {episode.id_} carries no trajectory: it was not sampled by a GTPO env "
            "runner, or it "
            "was sliced on the way."
        )
    trajectory: Trajectory = episode.custom_data[_TRAJECTORY]
    return trajectory


def group_trajectories(trajectories: Iterable[Trajectory]) -> list[Group]:
    """The groups that trajectories form, in the order of their first members."""
    groups: dict[int, Group] = {}
    for t in trajectories:
        groups.setdefault(t.group_id, Group(t.group_id, t.task, [])).trajectories.append(t)
    return list(groups.values())


def groups_of(episodes: Iterable[Any]) -> list[Group]:
    """The groups that episodes form."""
    return group_trajectories(trajectory_of(episode) for episode in episodes)
