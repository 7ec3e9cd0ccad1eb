"""Evaluates a policy: its tasks, or the episodes of another algorithm."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rllib_gtpo.command.interrupts import Stopper
from rllib_gtpo.evaluations.policy import Policy, built, restore
from rllib_gtpo.evaluations.protocol import Protocol, recorded_settings
from rllib_gtpo.evaluations.results import Results, prompt_text, task_rows
from rllib_gtpo.record.location import Location
from rllib_gtpo.record.recorder import record_header, token_decoder
from rllib_gtpo.record.schema import FILE_NAME
from rllib_gtpo.record.schema import METADATA as RECORD_METADATA
from rllib_gtpo.record.table import Recorded, build_table


@dataclass(frozen=True)
class Evaluated:
    """Results, and the rollouts behind them by split."""

    results: Results
    episodes: Mapping[str, Sequence[Any]] = field(default_factory=dict)


def evaluate_tasks(
    policy: Policy, settings: Any, protocol: Protocol, stopper: Stopper
) -> Evaluated:
    """Rolls out the tasks of `settings` with the weights of a policy.

    Raises:
        Interrupted: The stopper was asked to stop.
        ConfigError, DataError: See `restore`, and the environment's own.
    """
    from ray.rllib.env.env_context import EnvContext

    from rllib_gtpo.episodes import groups_of
    from rllib_gtpo.evaluation import sample_splits
    from rllib_gtpo.sampling import refuse_broken_environment
    from rllib_gtpo.text_env import as_tool_env

    with built(settings) as algorithm:
        stopper.attach(algorithm)
        restore(algorithm, policy)
        runners = algorithm.eval_env_runner_group
        runners.sync_weights(
            from_worker_or_learner_group=algorithm.learner_group,
            inference_only=True,
            timeout_seconds=None,
        )
        sampled = sample_splits(algorithm, runners)
        env = as_tool_env(algorithm.env_creator(EnvContext(settings.env_config, worker_index=0)))
    rows = []
    for split, part in sampled.items():
        groups = groups_of(part.episodes)
        refuse_broken_environment(groups, part.discarded)
        rows += task_rows(split, groups, _prompts(part.episodes), env.same_answer)
    env.close()
    about = {
        "source": str(policy.checkpoint),
        "iteration": policy.iteration,
        "algorithm": policy.algorithm,
        "environment": type(env).__name__,
        "splits": list(sampled),
        "overrides": list(protocol.overrides),
        "settings": recorded_settings(settings, protocol),
    }
    episodes = {split: part.episodes for split, part in sampled.items()}
    return Evaluated(Results(about, rows), episodes)


def evaluate_episodes(policy: Policy, settings: Any) -> dict[str, float]:
    """RLlib's own evaluation of an algorithm that has no tasks: returns and lengths."""
    from ray.rllib.utils.metrics import ENV_RUNNER_RESULTS

    from rllib_gtpo.command.stopping import numbers

    with built(settings) as algorithm:
        restore(algorithm, policy)
        found = numbers(algorithm.evaluate()[ENV_RUNNER_RESULTS])
    names = ("num_episodes", "episode_return", "episode_len")
    return {name: value for name, value in found.items() if name.startswith(names)}


def write_results(
    evaluated: Evaluated, policy: Policy, settings: Any, place: Location, record: bool
) -> tuple[str, list[str]]:
    """Writes the file of results and, with `record`, whole rollouts beside it.

    Returns:
        The address of the file, and those of the records, one a split.
    """
    results = evaluated.results
    name = _free_name(place, f"{policy.checkpoint.name}-{'+'.join(results.splits)}")
    records = []
    for split, episodes in evaluated.episodes.items() if record else ():
        folder = place / f"{name}.rollouts" / _file_name(split)
        _write_record(folder, policy, settings, split, episodes)
        records.append(folder.address)
    return results.write(place, name), records


def _write_record(
    folder: Location, policy: Policy, settings: Any, split: str, episodes: Sequence[Any]
) -> None:
    from rllib_gtpo.episodes import trajectory_of

    recorded = [Recorded(trajectory_of(e), e.get_observations(), None) for e in episodes]
    iteration = policy.iteration or 0
    groups = len({one.trajectory.group_id for one in recorded})
    about = {**record_header(settings), "iteration": iteration, "sampled_groups": groups}
    header = {RECORD_METADATA: json.dumps(about, default=str).encode()}
    folder.make()
    table = build_table(recorded, iteration, token_decoder(settings), header, split)
    folder.write(table, FILE_NAME.format(iteration))


def _prompts(episodes: Sequence[Any]) -> dict[int, str]:
    from rllib_gtpo.episodes import trajectory_of

    return {
        trajectory_of(episode).group_id: prompt_text(episode.get_observations()[0].messages)
        for episode in episodes
    }


def _free_name(place: Location, name: str) -> str:
    taken, base = place.names(), _file_name(name)
    candidate, count = base, 1
    while f"{candidate}.parquet" in taken:
        count += 1
        candidate = f"{base}-{count}"
    return candidate


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", text)
