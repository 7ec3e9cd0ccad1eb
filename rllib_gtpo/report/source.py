"""What there is to report: a run, one of its checkpoints, a trial of Tune, or a record alone."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rllib_gtpo.command.stopping import numbers
from rllib_gtpo.errors import ConfigError, DataError
from rllib_gtpo.record import IterationFile, record_files

_CHECKPOINT = re.compile(r"checkpoint_\d{6,}(-\d+)?")


@dataclass
class Source:
    """Everything that is read before the rollouts are.

    name: What the report is of.
    facts: What the run's own files say about it.
    results: The numbers of each iteration.
    files: The readable files of the record.
    notes: What could not be read, and what is missing, for people.
    """

    name: str
    facts: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, float]] = field(default_factory=list)
    files: list[IterationFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def about(self) -> dict[str, Any]:
        """What the newest file of the record says of the run; empty without a record."""
        return self.files[-1].about if self.files else {}


def open_source(target: str) -> Source:
    """Finds out what `target` is.

    Raises:
        ConfigError: It is nothing that can be reported.
        DataError: It is, and there is nothing in it yet.
    """
    if "://" in target:
        source = Source(target)
        source.files = record_files(target, source.notes)
    else:
        source = _local(Path(target))
    if not source.results and not source.files:
        why = "".join(f"\n{note}" for note in source.notes)
        raise DataError(f"{target} has nothing to report yet: no iteration has finished.{why}")
    if not source.files:
        source.notes.append(
            "This run has no rollout record, hence no groups: train with reporting(record=...) "
            "above 0."
        )
    return source


def _local(path: Path) -> Source:
    if not path.is_dir():
        raise ConfigError(f"{path}: no such directory.")
    last = None
    root = path
    if _CHECKPOINT.fullmatch(path.absolute().name):
        last, root = _iteration_of(path), path.absolute().parent
    run = _json(root / "run.json")
    if run.get("kind") == "sweep":
        trials = sorted(p.parent for p in root.glob("tune/*/result.json"))
        raise ConfigError(
            f"{root} is a sweep: name one of its trials, "
            + (f"such as {trials[0]}" if trials else "of which none has results yet")
        )
    source = Source(root.absolute().name, run)
    source.files = record_files(root, source.notes, last)
    of_a_run = any((root / name).is_file() for name in ("run.json", "result.json"))
    if not of_a_run and not source.files and not source.notes:
        raise ConfigError(f"{root} is not a run: it has no run.json, no result.json and no record.")
    source.results = read_results(root / "result.json", last)
    if last is not None:
        source.name = f"{source.name} at {path.name}"
    return source


def _iteration_of(checkpoint: Path) -> int:
    try:
        return int(json.loads((checkpoint / "progress.json").read_text())["training_iteration"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{checkpoint} is not a complete checkpoint of a run ({error}): name the run's "
            "directory."
        ) from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    return found if isinstance(found, dict) else {}


def read_results(path: Path, last: int | None = None) -> list[dict[str, float]]:
    """Rows of result.json; the torn last line of a run that is being written is not one."""
    rows = []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        try:
            row = numbers(json.loads(line))
        except (ValueError, AttributeError):
            continue
        if last is None or row.get("training_iteration", 0) <= last:
            rows.append(row)
    return rows
