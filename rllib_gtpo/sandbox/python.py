"""The entry point: `PythonSandbox`, its sessions, and what it enforces."""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Self

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.sandbox import probe
from rllib_gtpo.sandbox.cells import Job, SessionState
from rllib_gtpo.sandbox.limits import Limits, SandboxResult, SandboxUnavailable
from rllib_gtpo.sandbox.pool import Pool

LAYERS = ("auto", "landlock", "sealed", "rlimits-only")


class _Runner(ABC):
    """`run`, `arun` and the context manager over one way of submitting a job."""

    _pool: Pool
    _pid: int

    @abstractmethod
    def _submit(self, job: Job) -> None:
        """Hands a job to the pool, in the pool's thread."""

    @abstractmethod
    def close(self) -> None:
        """Kills what runs; may be called again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, code: str) -> SandboxResult:
        """Run `code` and wait.  Never raises for what the code does.

        Raises:
            SandboxUnavailable: The host cannot run code.
        """
        job = Job(code)
        self._post(partial(self._submit, job))
        try:
            return job.future.result()
        except BaseException:
            self._cancel(job)
            raise

    async def arun(self, code: str) -> SandboxResult:
        """Like `run`, without blocking the event loop; cancelling it kills the code."""
        job = Job(code)
        self._post(partial(self._submit, job))
        try:
            return await asyncio.wrap_future(job.future)
        except BaseException:
            self._cancel(job)
            raise

    def _post(self, callback: Callable[[], None]) -> None:
        if os.getpid() != self._pid:
            raise SandboxUnavailable("This sandbox belongs to the parent process: make one here.")
        self._pool.hub.post(callback)

    def _cancel(self, job: Job) -> None:
        if not job.future.done() or job.future.cancelled():
            job.future.cancel()
            self._post(partial(self._pool.cancel, job))


class Session(_Runner):
    """A notebook-like session: names stay between cells, which run one after the other.

    If a cell's process dies (time, output, a signal, `os._exit`), that cell's status says how, and
    the next cell starts in a new process with no names; the first line of its output says so.
    """

    def __init__(self, pool: Pool, pid: int) -> None:
        """Use `PythonSandbox.session()`."""
        self._pool, self._pid = pool, pid
        self._state = SessionState()
        self._closed = False
        self._post(partial(pool.open_session, self._state))

    def _submit(self, job: Job) -> None:
        self._pool.submit_cell(self._state, job)

    @property
    def restarts(self) -> int:
        """How often its process was lost, and with it the names, for whatever reason."""
        return self._state.restarts

    def close(self) -> None:
        """Kill the session's process.  Does not wait for it; may be called again."""
        if not self._closed and os.getpid() == self._pid:
            self._closed = True
            self._pool.hub.post(partial(self._pool.close_session, self._state))

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()


class PythonSandbox(_Runner):
    """Runs Python that nobody has read, each execution in a process of its own.

    What keeps it in is chosen by what the machine allows, from the top:

    1. namespaces, Landlock and seccomp;
    2. Landlock and seccomp (ordinary containers);
    3. *sealed*: seccomp alone, which refuses every open: only preloaded modules and a few of the
       standard library can be imported, no file can be written; a warning says so;
    4. nothing but resource limits: refused, unless `allow_degraded`.

    As root, each execution also has a user of its own.  At the start a probe tries what must be
    refused.  `guarantees` says what is enforced; bugs of the kernel stay in reach.

    May be used from any thread and any event loop of the process that made it, also inside Ray
    actors.  A forked child process of the host must make its own.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        workers: int | None = None,
        preload: Sequence[str] = (),
        start_timeout: float = 120.0,
        *,
        allow_degraded: bool = False,
        layers: str = "auto",
    ) -> None:
        """Start the process that executions are forked from, and wait until it is ready.

        Args:
            limits: Bounds of every execution.
            workers: Fresh runs at one time, by default one per core; more of them wait.  Sessions
                are not counted.
            preload: Modules that are imported once, before the first fork.
            start_timeout: Seconds that the preload may take.
            allow_degraded: Run also where the code cannot be confined, with a warning that names
                what is not enforced.
            layers: For tests: start no higher on the ladder than "landlock", "sealed" or
                "rlimits-only" (which needs `allow_degraded`).

        Raises:
            SandboxUnavailable: The process cannot start, a preloaded module cannot be imported, or
                the code cannot be confined here.
        """
        if not sys.platform.startswith("linux"):
            raise SandboxUnavailable(
                "The sandbox needs Linux: use a remote backend (rllib_gtpo.sandbox.remote)."
            )
        if isinstance(preload, str):
            raise ConfigError(f"preload must be a sequence of names: write ({preload!r},).")
        if layers not in LAYERS:
            raise ConfigError(f"layers must be one of {', '.join(LAYERS)}, got {layers!r}.")
        workers = workers or os.cpu_count() or 1
        self.limits = limits or Limits()
        self._pid = os.getpid()
        self._pool = Pool(self.limits, workers, preload, start_timeout, layers, allow_degraded)
        self._finalizer = weakref.finalize(self, _close, self._pool, self._pid)
        ready: Future[dict[str, Any]] = Future()
        self._post(partial(self._pool.start, ready))
        try:
            facts = ready.result(start_timeout)
            self.rung: str = facts["rung"]
            self._guarantees = probe.prove(self.run, self.limits, facts, allow_degraded)
        except TimeoutError:
            self.close()
            raise SandboxUnavailable(
                f"The sandbox did not start within {start_timeout:g} s (preload {preload})."
            ) from None
        except BaseException:
            self.close()
            raise

    def _submit(self, job: Job) -> None:
        self._pool.submit(job)

    def session(self) -> Session:
        """Open a session.  Does not wait for its process."""
        return Session(self._pool, self._pid)

    @property
    def guarantees(self) -> Mapping[str, bool]:
        """What is enforced here (True) and what is not (False), by name; see `MEANINGS`."""
        return self._guarantees

    @property
    def restarts(self) -> int:
        """How often the process that forks executions was lost and replaced."""
        return self._pool.restarts

    @property
    def reruns(self) -> int:
        """How many runs were lost with that process and ran again, unnoticed by the code."""
        return self._pool.reruns

    def close(self) -> None:
        """Kill all executions and sessions and remove their files; may be called again."""
        self._finalizer()


def _close(pool: Pool, pid: int) -> None:
    if os.getpid() == pid:
        pool.hub.post(pool.close)
        pool.hub.join(10.0)
