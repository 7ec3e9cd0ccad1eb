"""A checkpoint as a policy that can be evaluated, whatever machines it was trained on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rllib_gtpo.command.checkpoint import held_checkpoint, load_config
from rllib_gtpo.command.directory import file_hash, read_record
from rllib_gtpo.command.reading import reading

MODULE = Path("learner_group", "learner", "rl_module")


@dataclass(frozen=True)
class Policy:
    """A checkpoint and what is known of it.

    source: As people named it.
    config: What it was trained with.
    home: Where results go by default: its run's directory, or the one that it is in.
    iteration: Of its training, if it says so.
    notes: What people ought to know.
    held: Keeps the run from deleting the checkpoint as long as the policy lives.
    """

    source: Path
    checkpoint: Path
    config: Any
    home: Path
    iteration: int | None = None
    notes: list[str] = field(default_factory=list)
    held: Any = field(default=None, repr=False)

    @property
    def algorithm(self) -> str:
        """Its name."""
        return str(self.config.algo_class.__name__)

    @property
    def is_language_model(self) -> bool:
        """Whether it is evaluated on tasks; otherwise RLlib evaluates it on episodes."""
        from rllib_gtpo.config import GTPOConfig

        return isinstance(self.config, GTPOConfig)

    @classmethod
    def open(cls, source: Path) -> Policy:
        """The policy of a checkpoint, or of the last one of a run.

        The run's file is not needed: a checkpoint holds its settings, and the classes that the file
        defines as they were.

        Raises:
            ConfigError: There is no complete checkpoint, or it cannot be read here.
        """
        held = held_checkpoint(source)
        checkpoint = held.__enter__()
        home = checkpoint.absolute().parent
        there = (home / "run.json").is_file()
        record = read_record(home / "run.json") if there else None
        file = Path(record.file) if record is not None else None
        config = load_config(checkpoint, file)
        notes = []
        if record is not None and file is not None and file.is_file():
            changed = file_hash(file) != record.sha256
            if changed:
                notes.append(f"{file} has changed since the run: what it was then is evaluated.")
        return cls(source, checkpoint, config, home, _iteration(checkpoint), notes, held)


@contextmanager
def built(config: Any) -> Iterator[Any]:
    """The algorithm of a configuration, stopped at the end."""
    from rllib_gtpo.command.quiet import building
    from rllib_gtpo.command.trial import logdir_in

    with tempfile.TemporaryDirectory() as scratch:
        with logdir_in(Path(scratch)), building():
            algorithm = config.build_algo()
        try:
            yield algorithm
        finally:
            algorithm.stop()


def restore(algorithm: Any, policy: Policy) -> None:
    """Gives an algorithm the weights of a policy, and nothing else that a checkpoint holds.

    Raises:
        ConfigError: The checkpoint lacks them, or they are another model's.
    """
    with reading(policy.checkpoint):
        if not policy.is_language_model:
            algorithm.restore_from_path(str(policy.checkpoint.absolute()))
            return
        from rllib_gtpo.architecture import check_shapes
        from rllib_gtpo.supervision import call_learners

        weights = policy.checkpoint.absolute() / MODULE
        if not weights.is_dir():
            raise FileNotFoundError(f"there is no {MODULE}")
        own = call_learners(algorithm.learner_group, "weight_shapes")[0]
        check_shapes(str(policy.checkpoint.absolute()), None, own)
        algorithm.restore_from_path(str(weights), component=str(MODULE))
        algorithm.progress_made.cold_start_done = True


def _iteration(checkpoint: Path) -> int | None:
    try:
        return int(json.loads((checkpoint / "progress.json").read_text())["training_iteration"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
