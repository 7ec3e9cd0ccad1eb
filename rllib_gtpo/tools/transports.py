"""How messages reach an MCP server, with what the SDK's own transports do not tell or ensure."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

_STDERR_TAIL = 2000  # characters of a server's stderr that an error shows
# The server gets SIGTERM when this process is killed and cannot end it itself (Linux).
_DIE_WITH_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
    "os.getppid() == int(sys.argv[1]) or os._exit(1); os.execvp(sys.argv[2], sys.argv[2:])"
)


@dataclass(frozen=True)
class Address:
    """How to reach a server: a command that speaks MCP on its standard streams, or a URL."""

    command: tuple[str, ...] = ()
    url: str | None = None
    env: tuple[tuple[str, str], ...] = ()
    cwd: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    start_timeout: float = 60.0

    def __str__(self) -> str:
        return self.url if self.url is not None else " ".join(self.command)


class _Watched:
    """A stream of messages that tells when it ends."""

    def __init__(self, stream: Any, ended: Callable[[], None]) -> None:
        self._stream, self._ended = stream, ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> _Watched:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._stream.__anext__()
        except BaseException:
            self._ended()
            raise

    async def __aenter__(self) -> _Watched:
        await self._stream.__aenter__()
        return self

    async def __aexit__(self, *exception: Any) -> Any:
        return await self._stream.__aexit__(*exception)


class _Stderr:
    """The end of what a server writes to its stderr."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        self._tail = b""
        os.set_blocking(self._read, False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._read, self._take)

    def _take(self) -> bool:
        try:
            data = os.read(self._read, 1 << 16)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._read)
        self._tail = (self._tail + data)[-4 * _STDERR_TAIL :]
        return bool(data)

    def close(self) -> str:
        """The text; the pipe is gone then."""
        while self._take():
            pass
        self._loop.remove_reader(self._read)
        os.close(self._read)
        return self._tail.decode("utf-8", "replace").strip()[-_STDERR_TAIL:]


@asynccontextmanager
async def over_stdio(
    address: Address, ended: Callable[[], None], note_stderr: Callable[[str], None]
) -> AsyncIterator[Any]:
    """Starts the command; tells when its output ends, and afterwards the end of its stderr."""
    from mcp.client.stdio import StdioServerParameters, stdio_client

    command = list(address.command)
    path = dict(address.env).get("PATH", os.environ.get("PATH"))
    program = command[0]
    if address.cwd is not None and os.sep in program:
        program = os.path.join(address.cwd, program)
    if shutil.which(program, path=path) is None:
        raise FileNotFoundError(f"the command {command[0]!r} was not found")
    if sys.platform == "linux" and sys.executable:
        guard = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
        command = [*guard, *command]
    parameters = StdioServerParameters(
        command=command[0], args=command[1:], env=dict(address.env), cwd=address.cwd
    )
    stderr = _Stderr()
    try:
        with os.fdopen(stderr.write, "w") as theirs:
            async with stdio_client(parameters, errlog=theirs) as (read, write):
                theirs.close()  # the server has it
                yield _Watched(read, ended), write
    finally:
        note_stderr(stderr.close())


@asynccontextmanager
async def over_http(address: Address) -> AsyncIterator[Any]:
    """Speaks streamable HTTP to the URL, with any number of calls at a time."""
    import httpx2
    from mcp.client.streamable_http import streamable_http_client

    client = httpx2.AsyncClient(
        headers=dict(address.headers),
        timeout=httpx2.Timeout(30.0, read=None, pool=None),  # a tool has its own timeout
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100),
    )
    assert address.url is not None
    async with client, streamable_http_client(address.url, http_client=client) as streams:
        yield streams
