"""A Python session per trajectory, all of them on one sandbox of the process.

An environment makes it a tool with a method:

    class Maths(ToolEnv):
        def __init__(self, env_config=None):
            self.session = PythonSession(limits=Limits(cpu_seconds=2), preload=("sympy",))
            super().__init__(env_config)

        async def python(self, code: str) -> ToolResult:
            \"\"\"Run Python.  code: the code; print what you want to see.\"\"\"
            return to_tool_result(await self.session.arun(code))

        tools = [python]

and closes the session when the trajectory has ended.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence

from rllib_gtpo.sandbox import (
    Limits,
    PythonSandbox,
    SandboxResult,
    SandboxUnavailable,
    Session,
    Status,
)
from rllib_gtpo.types import ToolError, ToolResult

_sandboxes: dict[tuple[int, Limits, tuple[str, ...]], PythonSandbox] = {}
_lock = threading.Lock()


def shared_sandbox(limits: Limits, preload: tuple[str, ...]) -> PythonSandbox:
    """The process's sandbox for these settings; the first call starts it, exit closes it."""
    key = (os.getpid(), limits, preload)
    with _lock:
        if key not in _sandboxes:
            _sandboxes[key] = PythonSandbox(limits, preload=preload)
        return _sandboxes[key]


class PythonSession:
    """A notebook-like session that costs nothing until its first use."""

    def __init__(self, limits: Limits | None = None, preload: Sequence[str] = ()) -> None:
        """Sessions with equal settings share one sandbox."""
        self._limits, self._preload = limits or Limits(), tuple(preload)
        self._session: Session | None = None
        self._closed = False

    async def arun(self, code: str) -> SandboxResult:
        """Run `code` as the next cell.  Concurrent calls run one after the other.

        Raises:
            SandboxUnavailable: The host cannot run code, or the session is closed.
        """
        if self._session is None and not self._closed:
            key = (os.getpid(), self._limits, self._preload)
            sandbox = _sandboxes.get(key)
            if sandbox is None:  # to start one takes a while
                sandbox = await asyncio.to_thread(shared_sandbox, self._limits, self._preload)
            if self._session is None and not self._closed:  # another call may have been faster
                self._session = sandbox.session()
        if self._session is None:
            raise SandboxUnavailable("This session is closed: make one per trajectory.")
        return await self._session.arun(code)

    def close(self) -> None:
        """Kill the session's process, if there is one; returns at once, may be called again."""
        self._closed = True
        if self._session is not None:
            self._session.close()
            self._session = None


def to_tool_result(result: SandboxResult) -> ToolResult:
    """The result as a tool returns it: TIMEOUT, or RAISED for every other end but "ok"."""
    error = ToolError.TIMEOUT if result.status is Status.TIMEOUT else ToolError.RAISED
    return ToolResult("python", result.output, None if result.status is Status.OK else error)
