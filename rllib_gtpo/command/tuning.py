"""What an experiment file says to Ray Tune besides the settings: `tune_config` and `callbacks`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

MODES = ("max", "min")


@dataclass(frozen=True)
class Goal:
    """By what the trials of a sweep are compared.

    metric: A name as in result.json, slashes between its parts.
    mode: "max" or "min".
    """

    metric: str
    mode: str = "max"

    def better(self, one: float, other: float) -> bool:
        """Whether `one` is better than `other`."""
        return one > other if self.mode == "max" else one < other


def read_tuning(module: ModuleType, path: Path) -> tuple[Any, list[Any], int]:
    """`tune_config` (or None), `callbacks` and the number of samples of an experiment file.

    Raises:
        ConfigError: One of them is of another kind, or they contradict each other.
    """
    from ray.tune import Callback, TuneConfig

    tune_config = getattr(module, "tune_config", None)
    if tune_config is not None and not isinstance(tune_config, TuneConfig):
        kind = type(tune_config).__name__
        raise ConfigError(f"{path}: `tune_config` must be a ray.tune.TuneConfig, not {kind}")
    callbacks = getattr(module, "callbacks", None) or []
    wrong = [c for c in callbacks if not isinstance(c, Callback)] if _is_list(callbacks) else [0]
    if wrong:
        raise ConfigError(
            f"{path}: `callbacks` must be a list of objects of ray.tune.Callback, such as "
            "WandbLoggerCallback(project=...); RLlib's own belong to config.callbacks(...)"
        )
    samples = int(getattr(module, "num_samples", 1))
    if tune_config is not None and tune_config.num_samples != 1:
        if samples not in (1, tune_config.num_samples):
            raise ConfigError(
                f"{path}: num_samples = {samples}, but tune_config says "
                f"{tune_config.num_samples}: leave one of them out"
            )
        samples = tune_config.num_samples
    return tune_config, list(callbacks), samples


def goal_of(config: AlgorithmConfig, tune_config: Any) -> Goal:
    """What `tune_config` or its scheduler says, or else the accuracy, or the mean return.

    Raises:
        ConfigError: The mode is neither "max" nor "min".
    """
    from rllib_gtpo.config import GTPOConfig

    scheduler = getattr(tune_config, "scheduler", None)
    metric = getattr(tune_config, "metric", None) or getattr(scheduler, "_metric", None)
    mode = getattr(tune_config, "mode", None) or getattr(scheduler, "_mode", None) or "max"
    if mode not in MODES:
        raise ConfigError(f"tune_config: mode={mode!r} must be 'max' or 'min'")
    if metric is None and isinstance(config, GTPOConfig):
        metric = "evaluation/accuracy" if config.evaluation_interval else "accuracy"
    return Goal(metric or "env_runners/episode_return_mean", mode)


def with_goal(tune_config: Any, samples: int, goal: Goal) -> Any:
    """The TuneConfig to use: one of its own where the file has none."""
    from ray.tune import TuneConfig

    chosen = replace(tune_config or TuneConfig(), num_samples=samples)
    if chosen.trial_dirname_creator is None:
        chosen = replace(chosen, trial_dirname_creator=trial_directory)
    scheduler = chosen.scheduler
    if chosen.metric is None and getattr(scheduler, "_metric", None) is None:
        chosen = replace(chosen, metric=goal.metric, mode=goal.mode)
    return chosen


def varied_variants(config: AlgorithmConfig, limit: int) -> list[tuple[dict[str, Any], Any]]:
    """The first `limit` combinations of what is searched: its values by name, and the config.

    Sampled settings have one of their values; nothing is varied if there is no name.
    """
    from itertools import islice

    from ray.tune.search.variant_generator import generate_variants

    found = islice(generate_variants(config.to_dict()), limit)
    return [({"/".join(map(str, path)): v for path, v in r.items()}, spec) for r, spec in found]


def trial_number(trial: Any) -> int:
    """The place of one of Tune's trials in the order of their creation, from 1."""
    return int(str(trial.experiment_tag).split("_")[0]) + 1


def trial_directory(trial: Any) -> str:
    """ "trial_003_gamma=0.9_shaping=mean": also its name in TensorBoard."""
    settings = re.sub(r"[^\w.=+-]+", "_", show_settings(trial.evaluated_params))
    return f"trial_{trial_number(trial):03d}_{settings}"[:100].rstrip("_")


def show_settings(settings: Mapping[str, Any]) -> str:
    """ "gamma=0.9 shaping=mean": by the last part of their names."""
    return " ".join(f"{name.split('/')[-1]}={show_value(v)}" for name, v in settings.items())


def show_value(value: Any) -> str:
    """A setting's value, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
