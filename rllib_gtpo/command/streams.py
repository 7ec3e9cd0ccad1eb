"""Standard output and error as they may be: closed, full, or of a terminal that knows few
characters."""

from __future__ import annotations

import io
import os
import sys


def take_any_text() -> None:
    """Shows characters that a stream cannot encode by their numbers, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Writes what is left, so that a reader that has gone is noticed here, not after the end."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        mute_stdout()
        raise


def mute_stdout() -> None:
    """Sends standard output nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
