"""Ctrl-C and SIGTERM: the first asks for a stop at a safe point, the second quits at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

SIGINT_EXIT = 130
SIGTERM_EXIT = 143
PIPE_EXIT = 141


class Stopper:
    """Collects requests to stop; a context manager that owns the two signal handlers.

    `code` is 0 until somebody asks, then the exit code of whoever asked first.

    Args:
        doing: What the program does after the first signal, for people.
    """

    def __init__(self, doing: str = "finishing this step, then saving") -> None:
        self._doing = doing
        self.code = 0
        self._signals = 0
        self._algo: Any = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether the run should stop at the next safe point."""
        return self.code != 0

    def attach(self, algo: Any) -> None:
        """Makes requests reach `algo.request_stop()` if the algorithm has that method."""
        self._algo = algo
        if self.requested:
            self._tell()

    def request(self, code: int) -> None:
        """Asks for a stop; the first code wins."""
        if not self.code:
            self.code = code
            self._tell()

    def __enter__(self) -> Stopper:
        # Python delivers signals to the main thread only, and only it may install handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._algo = None

    def _tell(self) -> None:
        request_stop = getattr(self._algo, "request_stop", None)
        if callable(request_stop):
            request_stop()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._signals += 1
        code = SIGINT_EXIT if number == signal.SIGINT else SIGTERM_EXIT
        if self._signals == 1:
            # os.write, because print() from a handler may re-enter a print() it interrupted.
            line = f"\n{self._doing}; press Ctrl-C again to quit at once\n"
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, line.encode())
            self.request(code)
        elif self._signals == 2:
            self.code = code
            raise KeyboardInterrupt
        else:
            os._exit(code)  # whatever swallowed the exception does not get another chance
