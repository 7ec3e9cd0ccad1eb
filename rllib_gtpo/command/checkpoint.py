"""A checkpoint by the name that people give it, and the configuration that it holds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rllib_gtpo.command.directory import RunDirectory
from rllib_gtpo.command.locks import kept
from rllib_gtpo.command.reading import reading
from rllib_gtpo.errors import ConfigError

_ATTEMPTS = 10  # to hold a checkpoint before its run deletes it
_MARK = "rllib_checkpoint.json"  # RLlib writes it into every checkpoint


@contextmanager
def held_checkpoint(source: Path) -> Iterator[Path]:
    """A checkpoint itself, or the last one of a run, which its run does not delete meanwhile.

    Raises:
        ConfigError: There is none.
    """
    for _ in range(_ATTEMPTS):
        checkpoint = _find_checkpoint(source)
        with kept(checkpoint) as in_time:
            if in_time:
                yield checkpoint
                return
    raise ConfigError(f"{source} has been deleted by its run: name another one, or raise --keep.")


def _find_checkpoint(source: Path) -> Path:
    if not source.is_dir():
        raise ConfigError(f"{source}: no such directory.")
    if (source / _MARK).is_file():
        return source
    _, found = RunDirectory.open(source)
    if found is None:
        raise ConfigError(f"{source} is a sweep: name one of the checkpoints of its trials.")
    return found.path


def load_config(checkpoint: Path, beside: Path | None = None) -> Any:
    """The AlgorithmConfig that a checkpoint was trained with.

    Args:
        checkpoint: Its directory.
        beside: The file of its run, whose folder may hold modules that it imported.

    Raises:
        ConfigError: It is not complete, or needs modules that cannot be imported here.
    """
    from ray import cloudpickle
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    if beside is not None and str(beside.parent) not in sys.path:
        sys.path.insert(0, str(beside.parent))
    with reading(checkpoint), (checkpoint / "class_and_ctor_args.pkl").open("rb") as file:
        made = cloudpickle.load(file)
    config = AlgorithmConfig.from_state(made["ctor_args_and_kwargs"][0][0])
    vars(config).pop("class", None)  # a state's own entry, which no config has
    config.algo_class = made["class"]  # it may be of the experiment's own file
    return config
