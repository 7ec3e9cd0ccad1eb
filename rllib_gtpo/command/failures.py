"""Turns what escapes a command into a message and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable

from rllib_gtpo.command.interrupts import PIPE_EXIT, SIGINT_EXIT
from rllib_gtpo.command.streams import flush_stdout, mute_stdout
from rllib_gtpo.errors import (
    ChatTemplateError,
    ConfigError,
    DataError,
    GTPOError,
    RewardError,
)

_NO_DISK = ". Make room there; a run goes on from its last checkpoint with --resume."
_NO_SPILLING = (
    ". Ray's object store is full, and so is the disk that it spills to (/tmp/ray, or "
    "RAY_TMPDIR): make room there, or name another disk. Fewer groups_per_step need less."
)
_NO_STORE = (
    ". Ray's object store is too small for what goes from rollouts to learners: start Ray with "
    "a larger one (`ray start --object-store-memory BYTES`, and --ray-address), or take fewer "
    "groups_per_step."
)
_BAD_INPUT = (ConfigError, DataError, ChatTemplateError, RewardError)


def guarded(command: Callable[[], int], debug: bool = False) -> int:
    """Runs `command`; the exit code of what it returned or raised."""
    try:
        try:
            return command()
        finally:
            flush_stdout()
    except KeyboardInterrupt:  # training has a Stopper, so this is before or after it
        print("interrupted", file=sys.stderr)
        return SIGINT_EXIT
    except BrokenPipeError:
        mute_stdout()
        return PIPE_EXIT
    except Exception as error:
        tell(error, "error", debug)
        return 2 if is_bad_input(error) else 1


def is_bad_input(error: BaseException) -> bool:
    """Whether it would happen again: a file, an option or a setting is wrong."""
    return isinstance(_find(error), _BAD_INPUT)


def tell(error: BaseException, kind: str, debug: bool = False) -> None:
    """Prints what happened; with the traceback, if nobody has written a message for it."""
    ours = _find(error)
    remedy = _remedy(error)
    if debug or (ours is None and remedy is None):
        traceback.print_exception(error)
    text = str(ours or f"{type(error).__name__}: {error}")
    if remedy is not None:
        text = text.rstrip(".") + remedy
    print(f"{kind}: {text}", file=sys.stderr)


def _remedy(error: BaseException) -> str | None:
    """What helps when a machine has run out of something."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _NO_DISK
    ray_errors = sys.modules.get("ray.exceptions")  # no reason to load it, if it is not
    if ray_errors is not None and isinstance(error, ray_errors.OutOfDiskError):
        return _NO_SPILLING
    if ray_errors is not None and isinstance(error, ray_errors.ObjectStoreFullError):
        return _NO_STORE
    return None


def _find(error: BaseException | None) -> GTPOError | None:
    """The error of this package in a chain; Ray wraps what a worker raised."""
    while error is not None:
        if isinstance(error, GTPOError):
            return error
        error = error.__cause__ or error.__context__
    return None
