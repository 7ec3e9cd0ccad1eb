"""Who uses a run's directory: one trainer, and any number of readers, each of which keeps the
checkpoint that it reads from being deleted.

The locks are the kernel's (flock), so that they end with their process however it ends.  A file
system without them has no such protection.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rllib_gtpo.errors import ConfigError

LOCK_FILE = "trainer.lock"  # says who trains, or has trained, in the directory


@contextmanager
def one_trainer(run: Path) -> Iterator[None]:
    """While it lasts no other trainer may use the run's directory.

    Raises:
        ConfigError: Another one does.
    """
    file = os.open(run / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(file, fcntl.LOCK_EX):
            owner = os.pread(file, 200, 0).decode(errors="replace").strip()
            raise ConfigError(
                f"{run} is being trained by {owner or 'another process'}: wait for its end, or "
                "stop it first (Ctrl-C or SIGTERM saves)"
            )
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


@contextmanager
def kept(checkpoint: Path) -> Iterator[bool]:
    """While it lasts the run does not delete the checkpoint; False if it is too late for that."""
    try:
        directory = os.open(checkpoint, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        locked = _lock(directory, fcntl.LOCK_SH)
        yield locked and checkpoint.exists()
    finally:
        os.close(directory)


def delete_unless_kept(checkpoint: Path) -> None:
    """Deletes a checkpoint that nobody reads.  It disappears at once, not file by file."""
    directory = os.open(checkpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if _lock(directory, fcntl.LOCK_EX):
            doomed = checkpoint.rename(f"{checkpoint}.tmp-{os.getpid()}")
            shutil.rmtree(doomed, ignore_errors=True)
    finally:
        os.close(directory)


def _lock(file: int, kind: int) -> bool:
    """Whether nobody else has a lock that excludes this one."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
