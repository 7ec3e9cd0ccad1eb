"""One daemon thread that owns every descriptor and timer of a sandbox.

All state is touched by this thread alone; other threads and event loops post callbacks and wait for
futures.  So a sandbox works alike from plain code, from threads, from any number of event loops and
inside actors, and nothing in it needs a lock.
"""

from __future__ import annotations

import heapq
import itertools
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable

Callback = Callable[[], None]


class Hub:
    """Runs callbacks when posted, when a descriptor is ready, or when their time has come."""

    def __init__(self, on_crash: Callable[[BaseException], None]) -> None:
        """Start the thread.  `on_crash` is called in it if a callback raises, which ends it."""
        self._commands: deque[Callback] = deque()
        self._timers: list[tuple[float, int, Callback]] = []
        self._numbers = itertools.count()
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ, lambda: None)
        self._on_crash = on_crash
        self.stopped = False
        self._thread = threading.Thread(target=self._run, name="sandbox-hub", daemon=True)
        self._thread.start()

    def post(self, callback: Callback) -> None:
        """Run `callback` in the hub's thread; after `stop`, in this one."""
        self._commands.append(callback)
        if self.stopped:
            self._run_commands()
            return
        try:
            os.eventfd_write(self._wake, 1)
        except OSError:  # stopped meanwhile: its last act was to run the commands
            self._run_commands()

    def watch(self, fd: int, callback: Callback, events: int = selectors.EVENT_READ) -> None:
        """Call `callback` whenever `fd` is ready (hub's thread only)."""
        self._selector.register(fd, events, callback)

    def rewatch(self, fd: int, callback: Callback, events: int) -> None:
        """Change what a watched descriptor is watched for (hub's thread only)."""
        self._selector.modify(fd, events, callback)

    def unwatch(self, fd: int) -> None:
        """Stop watching; to be called before the descriptor is closed (hub's thread only)."""
        self._selector.unregister(fd)

    def after(self, seconds: float, callback: Callback) -> None:
        """Call `callback` once, later (hub's thread only).  Timers cannot be cancelled."""
        when = time.monotonic() + max(seconds, 0.0)
        heapq.heappush(self._timers, (when, next(self._numbers), callback))

    def stop(self) -> None:
        """End the thread after what it is doing (hub's thread only)."""
        self.stopped = True

    def join(self, timeout: float) -> None:
        """Wait for the thread to end."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            while not self.stopped:
                self._step()
        except BaseException as error:
            self.stopped = True
            self._on_crash(error)
        finally:
            self._run_commands()
            self._selector.close()
            os.close(self._wake)

    def _step(self) -> None:
        timeout = self._timers[0][0] - time.monotonic() if self._timers else None
        for key, _ in self._selector.select(timeout):
            if key.fd == self._wake:
                os.eventfd_read(self._wake)
            elif self._selector.get_map().get(key.fd) is key:  # not closed by an earlier callback
                key.data()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()
        self._run_commands()

    def _run_commands(self) -> None:
        while self._commands:
            try:
                command = self._commands.popleft()
            except IndexError:
                return
            command()
