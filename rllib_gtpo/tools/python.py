"""Python for one trajectory: on this machine's sandbox, or on a SandboxFusion service.

An environment makes it a tool with a method, and closes it with the trajectory:

    class Maths(ToolEnv):
        def reset(self, **kwargs):
            self.close()
            self.session = PythonSession(Limits(cpu_seconds=2), preload=("sympy",))
            return super().reset(**kwargs)

        async def python(self, code: str) -> ToolResult:
            \"\"\"Run Python.  code: the code; print what you want to see.\"\"\"
            return to_tool_result(await self.session.arun(code))

        def close(self):
            if self.session is not None:
                self.session.close()

        tools = [python]

Hundreds of trajectories share one sandbox per process.  The first call starts it, which takes
seconds with a preload (`shared_sandbox` starts it ahead).  What they use is bounded:

- At most `cell_slots` cells run at one time, so that all of them at their memory limit take half of
  what the node had when the sandbox started; other calls wait.  That wait, and up to
  `Limits.wall` for the code, counts towards the environment's `tool_timeout`.
- A session between two cells takes no slot.  It keeps its process, that is, the memory of its
  variables, as long as the node has memory for more cells; else the sessions that were used longest
  ago lose theirs, and their next result begins with `RESTARTED`.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.sandbox import Limits, PythonSandbox, SandboxResult, SandboxUnavailable, Status
from rllib_gtpo.sandbox.backend import SandboxBackend, SessionBackend
from rllib_gtpo.sandbox.limits import RESTARTED
from rllib_gtpo.sandbox.output import clip
from rllib_gtpo.sandbox.remote import RemoteSandbox
from rllib_gtpo.types import ToolError, ToolResult

Service = str | Mapping[str, Any]
"""A service's address, or {"url": ...} with keywords of `RemoteSandbox`."""

_SERVICE_KEYS = ("url", "concurrency", "attempts", "backoff", "grace_seconds", "headers")
_CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        *("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ),
)
_ERRORS = {
    Status.OK: None,
    Status.TIMEOUT: ToolError.TIMEOUT,
    Status.KILLED: ToolError.CRASHED,
}
_LOOK_EVERY_S = 0.05
_EVICTED_AT_ONCE = 2  # more than one comes per start, so that memory recovers


def available_mb() -> int:
    """Memory that processes can still take, by the node and by this container's control group."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) >> 10
    for directory, limit, used, cache in _CONTROL_GROUPS:
        try:
            most = (directory / limit).read_text().strip()
            taken = int((directory / used).read_text())
            stat = dict(s.split() for s in (directory / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most != "max":
            room = int(most) - taken + int(stat.get(cache, 0))  # the cache gives way
            available = min(available, max(room, 0) >> 20)
    return available


def cell_slots(limits: Limits) -> int:
    """Cells that may run at one time: half of the available memory, at most four per core."""
    return max(1, min(4 * (os.cpu_count() or 1), available_mb() // 2 // int(limits.memory_mb)))


class _Slots:
    """A semaphore for any number of threads and event loops."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[Future[None]] = deque()
        self._lock = threading.Lock()

    async def __aenter__(self) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn: Future[None] = Future()
            self._waiting.append(turn)
        try:
            await asyncio.wrap_future(turn)
        except BaseException:
            if not turn.cancel():  # it had come already
                self._release()
            raise

    async def __aexit__(self, *exception: object) -> None:
        self._release()

    def _release(self) -> None:
        with self._lock:
            while self._waiting:
                turn = self._waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    turn.set_result(None)
                    return
            self._free += 1


class _Host:
    """A sandbox and the sessions that this process has on it."""

    def __init__(self, sandbox: SandboxBackend, limits: Limits, count: int) -> None:
        self.sandbox, self.limits = sandbox, limits
        self.slots = _Slots(count)
        self.running = 0
        self._room_for_all = count * limits.memory_mb
        self._next_look = 0.0  # at the memory, which is read from a dozen lines of text
        self._idle: weakref.WeakKeyDictionary[PythonSession, None] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def begin(self, session: PythonSession) -> SessionBackend:
        """The process for a cell of `session`; others may lose theirs for it."""
        with self._lock:
            self._idle.pop(session, None)
            self.running += 1
            if self._idle and self._short_of_memory():
                for other in list(self._idle)[:_EVICTED_AT_ONCE]:
                    del self._idle[other]
                    other._evict()
            if session._session is None:
                session._session = self.sandbox.session()
            return session._session

    def _short_of_memory(self) -> bool:
        """Whether running cells may need more than there is; not asked again at once after there
        was enough for every slot."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        available = available_mb()
        if available >= self._room_for_all:
            self._next_look = now + _LOOK_EVERY_S
        return available < self.running * self.limits.memory_mb

    def end(self, session: PythonSession) -> None:
        """A cell of `session` is over."""
        with self._lock:
            self.running -= 1
            if session._session is not None:
                self._idle[session] = None

    def forget(self, session: PythonSession) -> None:
        """`session` is closed."""
        with self._lock:
            self._idle.pop(session, None)


_hosts: dict[tuple[int, Limits, tuple[str, ...], str], _Host] = {}
_lock = threading.Lock()


def shared_sandbox(
    limits: Limits, preload: tuple[str, ...], service: Service | None = None
) -> SandboxBackend:
    """The process's sandbox for these settings; the first call starts it, exit closes it."""
    return _host(limits, preload, _service_options(service)).sandbox


def sandbox_restarts() -> int:
    """How often this process's sandboxes lost the process that forks executions, and healed."""
    with _lock:
        sandboxes = [host.sandbox for key, host in _hosts.items() if key[0] == os.getpid()]
    return sum(s.restarts for s in sandboxes if isinstance(s, PythonSandbox))


def _service_options(service: Service | None) -> dict[str, Any]:
    """Keywords of `RemoteSandbox`; none for this machine's own."""
    if service is None:
        return {}
    options = {"url": service} if isinstance(service, str) else dict(service)
    for name in options:
        if name not in _SERVICE_KEYS:
            raise ConfigError(f"sandbox: unknown {name!r}{did_you_mean(name, _SERVICE_KEYS)}.")
    if "url" not in options:
        raise ConfigError('sandbox: give a URL or {"url": ...}, or leave it out for the local one.')
    return options


def _key(
    limits: Limits, preload: tuple[str, ...], service: dict[str, Any]
) -> tuple[int, Limits, tuple[str, ...], str]:
    return os.getpid(), limits, preload, json.dumps(service, sort_keys=True, default=str)


def _host(limits: Limits, preload: tuple[str, ...], service: dict[str, Any]) -> _Host:
    key = _key(limits, preload, service)
    with _lock:
        if key not in _hosts:
            count = cell_slots(limits)
            sandbox: SandboxBackend
            if service:
                sandbox = RemoteSandbox(limits=limits, **service)
            else:
                workers = min(count, os.cpu_count() or 1)
                sandbox = PythonSandbox(limits, workers=workers, preload=preload)
            _hosts[key] = _Host(sandbox, limits, count)
        return _hosts[key]


class PythonSession:
    """Runs a trajectory's code.  Costs nothing until its first use."""

    def __init__(
        self,
        limits: Limits | None = None,
        preload: Sequence[str] = (),
        *,
        sandbox: Service | None = None,
        stateful: bool = True,
    ) -> None:
        """Sessions with equal settings share one sandbox of the process.

        Args:
            limits: Bounds of every cell.
            preload: Modules that the local sandbox imports once, for all.
            sandbox: Where the code runs: this machine, or a service, see `Service`.
            stateful: Whether names stay from one call to the next, as in a notebook.

        Raises:
            ConfigError: A setting is wrong or would have no effect.
        """
        self._limits, self._preload = limits or Limits(), tuple(preload)
        self._service = _service_options(sandbox)
        self._stateful = stateful
        if self._service:
            RemoteSandbox(limits=self._limits, **self._service).close()  # refuses what is wrong
            if stateful:
                raise ConfigError(
                    f"sandbox={self._service['url']!r} keeps no names between calls: set "
                    "stateful=False, or leave sandbox out for the local one."
                )
            if self._preload:
                raise ConfigError(f"preload={self._preload} has no effect on a service.")
        self._one = _Slots(1)
        self._host: _Host | None = None
        self._session: SessionBackend | None = None
        self._evicted = self._closed = False

    async def arun(self, code: str) -> SandboxResult:
        """Run `code` as the next cell, or by itself.  Calls run one after the other if stateful.

        Raises:
            SandboxUnavailable: The sandbox cannot run code, or this is closed.
        """
        if self._host is None and not self._closed:
            settings = (self._limits, self._preload, self._service)
            self._host = _hosts.get(_key(*settings))
            if self._host is None:  # to start one takes a while
                self._host = await asyncio.to_thread(_host, *settings)
        if not self._stateful:
            return await self._open().sandbox.arun(code)
        async with self._one, self._open().slots:
            host = self._open()
            session = host.begin(self)
            try:
                result = await session.arun(code)
            finally:
                host.end(self)
        if self._evicted:
            self._evicted = False
            output = clip(RESTARTED + result.output, self._limits.output_chars)
            result = replace(result, output=output)
        return result

    def close(self) -> None:
        """End the session's process, if there is one; returns at once, may be called again."""
        self._closed = True
        if self._host is not None:
            self._host.forget(self)
        if self._session is not None:
            self._session.close()
            self._session = None

    def _open(self) -> _Host:
        if self._closed or self._host is None:
            raise SandboxUnavailable("This session is closed: make one per trajectory.")
        return self._host

    def _evict(self) -> None:
        """Lose the process between two cells."""
        if self._session is not None:
            self._session.close()
            self._session, self._evicted = None, True


def to_tool_result(result: SandboxResult) -> ToolResult:
    """The result as a tool returns it: TIMEOUT, CRASHED (killed by a signal), or RAISED for every
    other end but "ok".

    The text says how the code ended, also where it was stopped ("[Timed out after ...]").
    """
    error = _ERRORS.get(result.status, ToolError.RAISED)
    return ToolResult("python", result.output, error)
