"""Turns what escapes a command into a message and an exit code."""

from __future__ import annotations

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

_BAD_INPUT = (ConfigError, DataError, ChatTemplateError, RewardError)


def guarded(command: Callable[[], int], debug: bool = False) -> int:
    """Runs `command`; the exit code of what it returned or raised."""
    try:
        try:
            return command()
        finally:
            flush_stdout()
    except KeyboardInterrupt:
        return SIGINT_EXIT
    except BrokenPipeError:
        mute_stdout()
        return PIPE_EXIT
    except Exception as error:
        ours = _find(error)
        if ours is None or debug:
            traceback.print_exception(error)
        print(f"error: {ours or f'{type(error).__name__}: {error}'}", file=sys.stderr)
        return 2 if isinstance(ours, _BAD_INPUT) else 1


def _find(error: BaseException | None) -> GTPOError | None:
    """The error of this package in a chain; Ray wraps what a worker raised."""
    while error is not None:
        if isinstance(error, GTPOError):
            return error
        error = error.__cause__ or error.__context__
    return None
