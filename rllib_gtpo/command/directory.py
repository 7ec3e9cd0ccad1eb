"""A run's directory: run.json, checkpoints that are either complete or absent, and retention.

    runs/NAME_20260131-120000/
        run.json                 what was started, so that --resume needs nothing else
        params.json result.json progress.csv events.out.tfevents.*
        trainer.lock             held by the one process that trains here
        checkpoint_000010/       written as checkpoint_000010.tmp-PID, then renamed

A second checkpoint of the same iteration (a stop in the middle of a step) is checkpoint_000010-1.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rllib_gtpo.command.locks import LOCK_FILE, delete_unless_kept
from rllib_gtpo.command.stopping import hint
from rllib_gtpo.errors import ConfigError, GTPOError

_NAME = re.compile(r"checkpoint_(\d{6,})(?:-(\d+))?")
_PROGRESS = "progress.json"  # written last: a checkpoint without it is not complete
_RECORD = "run.json"
_ATTEMPTS = 10  # to list checkpoints that come and go meanwhile


class SaveError(GTPOError, OSError):
    """A checkpoint could not be written; the message says how much room there is."""


@dataclass
class RunRecord:
    """The contents of run.json."""

    file: str
    sha256: str
    name: str
    algorithm: str
    overrides: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    status: str = "running"  # running | interrupted | completed
    kind: str = "run"  # run | sweep
    held_out_accuracy: list[float] | None = None
    trial_id: str = ""  # by which trackers know a run that goes on
    metric: str | None = None  # of a sweep: by what its trials are compared,
    mode: str = "max"  # and whether more of it is better
    source: list[str] = field(default_factory=list)  # --algo, --env of a run without a file
    failures: int = 0  # after which training began again from the last checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint and where training stood."""

    path: Path
    iteration: int
    copy: int = 0

    @property
    def progress(self) -> dict[str, Any]:
        """{"training_iteration", "time_total_s", "metrics"} at the time of saving."""
        try:
            progress: dict[str, Any] = json.loads((self.path / _PROGRESS).read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path / _PROGRESS} is damaged: {error}") from error
        return progress


def file_hash(path: Path) -> str:
    """SHA-256 of a source file, to recognise it after it was moved."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


class RunDirectory:
    """The only place that creates, lists and deletes what a run writes."""

    def __init__(self, path: Path, record: RunRecord, keep: int = 2) -> None:
        self.path = path
        self.record = record
        self.keep = max(1, keep)

    @classmethod
    def create(cls, path: Path, record: RunRecord, keep: int = 2) -> RunDirectory:
        """Makes the directory; refuses one that already holds a run that began."""
        began = (path / _RECORD).exists() and {*os.listdir(path)} - {_RECORD, LOCK_FILE}
        if began:
            raise ConfigError(f"{path} already holds a run: continue it with --resume {path}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            run = cls(path, record, keep)
            run.write_record()
        except OSError as error:
            raise ConfigError(f"cannot create the run directory {path}: {error}") from error
        return run

    @classmethod
    def open(cls, path: Path, keep: int = 2) -> tuple[RunDirectory, Checkpoint | None]:
        """Opens RUN or RUN/checkpoint_N; also the checkpoint to continue from (None: a sweep)."""
        chosen = path if _NAME.fullmatch(path.name) else None
        root = path.parent if chosen else path
        if not path.exists():
            siblings = [p.name for p in path.parent.glob("*")]
            raise ConfigError(f"there is no directory {path}{hint(path.name, siblings)}")
        if not (root / _RECORD).is_file():
            raise ConfigError(f"{root} is not a run: it has no {_RECORD}")
        record = read_record(root / _RECORD)
        run = cls(root, record, keep)
        if record.kind == "sweep":
            return run, None
        found = run.checkpoints()
        if chosen is not None:
            found = [c for c in found if c.path.name == chosen.name]
        if not found:
            raise ConfigError(
                f"{path} has no complete checkpoint: start the run again without --resume"
            )
        return run, found[-1]

    def write_record(self) -> None:
        """Writes run.json atomically."""
        replace_text(self.path / _RECORD, json.dumps(asdict(self.record), indent=2) + "\n")

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints, oldest first."""
        for _ in range(_ATTEMPTS):
            found = [
                Checkpoint(entry, int(match[1]), int(match[2] or 0))
                for entry in self.path.iterdir()
                if (match := _NAME.fullmatch(entry.name)) and (entry / _PROGRESS).is_file()
            ]
            if found:
                break  # else all may have been replaced while they were listed
        return sorted(found, key=lambda c: (c.iteration, c.copy))

    def clean(self, restored: Checkpoint) -> list[Path]:
        """Removes what a killed process left and sets newer checkpoints aside; returns those."""
        for entry in self.path.glob("checkpoint_*.tmp-*"):
            shutil.rmtree(entry, ignore_errors=True)
        for entry in (*self.path.glob("*.tmp"), *self.path.glob("record/.*.tmp-*")):
            entry.unlink()
        moved = []
        for newer in self.checkpoints():
            if (newer.iteration, newer.copy) > (restored.iteration, restored.copy):
                target = _free_name(self.path / f"superseded_{newer.path.name}")
                newer.path.rename(target)
                moved.append(target)
        return moved

    def save(
        self, iteration: int, progress: Mapping[str, Any], write: Callable[[str], Any]
    ) -> Checkpoint:
        """Saves through `write(directory)`; on failure nothing of the attempt stays.

        Raises:
            SaveError: The file system refused; older checkpoints are untouched.
        """
        final = _free_name(self.path / f"checkpoint_{iteration:06d}")
        partial = self.path / f"{final.name}.tmp-{os.getpid()}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write(str(partial.absolute()))  # RLlib reads a relative path as a URL
            (partial / _PROGRESS).write_text(json.dumps(dict(progress), indent=2) + "\n")
            _sync(partial)
            partial.rename(final)
        except Exception as error:
            written = _size(partial)
            free = shutil.disk_usage(self.path).free
            shutil.rmtree(partial, ignore_errors=True)
            if _is_storage_failure(error, free):
                raise SaveError(self._save_message(final, error, written, free)) from error
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in self.checkpoints()[: -self.keep]:
            delete_unless_kept(old.path)
        match = _NAME.fullmatch(final.name)
        return Checkpoint(final, iteration, int(match[2] or 0) if match else 0)

    def _save_message(self, final: Path, error: Exception, written: int, free: int) -> str:
        previous = self.checkpoints()
        needed = max([written, *(_size(c.path) for c in previous)])
        about = "needs about" if previous else "needs more than"
        return (
            f"could not save {final.name}: {error}. A checkpoint {about} {_human(needed)}, "
            f"{_human(free)} are free in {self.path.absolute()}"
        )


def read_record(path: Path) -> RunRecord:
    """The contents of a run.json; ConfigError if it is damaged, or of another version."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
        unknown = [key for key in content if key not in RunRecord.__dataclass_fields__]
        if not unknown:
            return RunRecord(**content)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    there = dict(content.get("versions") or {}).get("rllib-gtpo", "of another version")
    raise ConfigError(
        f"{path} was written by rllib-gtpo {there}; {', '.join(unknown)} means nothing to this one "
        f"({metadata.version('rllib-gtpo')}): continue the run with the version that started it."
    )


def replace_text(path: Path, text: str, newline: str | None = None) -> None:
    """Writes a file that is complete at any time; what was there stays if that fails."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        partial.write_text(text, newline=newline)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _is_storage_failure(error: Exception, free: int) -> bool:
    """Whether the disk is to blame.  torch and safetensors wrap ENOSPC in errors of their own."""
    text = str(error)
    return (
        isinstance(error, OSError)
        or os.strerror(errno.ENOSPC) in text
        or "PytorchStreamWriter failed" in text
        or free < 1 << 20
    )


def _free_name(path: Path) -> Path:
    candidate, count = path, 0
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


def _sync(directory: Path) -> None:
    """Forces the files to disk, so that a rename never becomes visible before its contents."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())


def _size(directory: Path) -> int:
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file())


def _human(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
