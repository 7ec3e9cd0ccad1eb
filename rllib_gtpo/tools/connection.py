"""Connections to MCP servers, all on one event loop of the process.

Every batch of rollouts has an event loop of its own, and a connection outlives many of them: so
connections live on a loop in a daemon thread, and calls come to them from any loop or thread.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakSet

from rllib_gtpo.errors import EnvironmentFault
from rllib_gtpo.types import ToolError, ToolResult

T = TypeVar("T")

_STDERR_TAIL = 2000  # characters of a server's stderr that an error shows
_EXIT_SECONDS = 8.0  # to wait for servers when the process exits; the SDK kills after four
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


class Connection:
    """A session with a server, which starts with the first use and again after the server died.

    All methods are for the loop of `home()`.
    """

    def __init__(self, address: Address) -> None:
        self.address = address
        self._lock = asyncio.Lock()
        self._session: asyncio.Future[Any] | None = None  # the SDK's client, when it is ready
        self._task: asyncio.Task[None] | None = None  # what keeps the session open
        self._stop = asyncio.Event()
        self._users = 0
        self._stderr = ""

    async def list_tools(self) -> list[Any]:
        """The server's tools, as the SDK has them."""
        client: Any = await asyncio.shield(await self._connect())
        tools: list[Any] = []
        cursor = None
        while True:
            page = await client.list_tools(cursor=cursor)
            tools += page.tools
            cursor = page.next_cursor
            if not cursor:
                return tools

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """What the server answers, as the SDK has it; a ToolResult if it answers with an error.

        A call during which the connection was lost is not repeated, for it may have had effects;
        the next one finds a new connection.

        Raises:
            EnvironmentFault: There is no server.
        """
        from mcp.shared.exceptions import MCPError

        session = await self._connect()
        client: Any = await asyncio.shield(session)
        try:
            return await client.call_tool(name, dict(arguments))
        except MCPError as error:
            if not _is_lost(error):
                return ToolResult(name, f"Error: {error.message}", ToolError.RAISED)
            lost = error
        self._forget(session)
        client = await asyncio.shield(await self._connect())
        if _was_not_run(lost):
            return await client.call_tool(name, dict(arguments))
        text = "Error: the tool's server stopped during the call; it was started anew"
        return ToolResult(name, text, ToolError.RAISED)

    def join(self) -> None:
        """One more needs the server."""
        self._users += 1

    def leave(self) -> None:
        """One less needs the server; the last one ends it."""
        self._users -= 1
        if not self._users:
            _tasks.add(task := asyncio.ensure_future(self.close(even_if_used=False)))
            task.add_done_callback(_tasks.discard)

    async def close(self, even_if_used: bool = True) -> None:
        """End the session and the server's process; the next use would start them again."""
        async with self._lock:
            if even_if_used or not self._users:
                await self._disconnect()

    async def _connect(self) -> asyncio.Future[Any]:
        """The session that there is or will be; whoever gives up waiting for it does not end it."""
        async with self._lock:
            if self._session is None:
                await self._disconnect()
                self._stop = asyncio.Event()
                self._session = asyncio.get_running_loop().create_future()
                self._task = asyncio.create_task(self._hold(self._session, self._stop))
            return self._session

    async def _disconnect(self) -> None:
        self._session = None
        self._stop.set()
        if self._task is not None:
            await asyncio.wait((self._task,))
            self._task = None

    def _forget(self, session: asyncio.Future[Any]) -> None:
        if self._session is session:
            self._session = None

    async def _hold(self, session: asyncio.Future[Any], stop: asyncio.Event) -> None:
        """Keeps a session open until `stop`, in one task, as the SDK needs it."""
        import anyio
        from mcp import Client

        def ended() -> None:
            self._forget(session)
            stop.set()

        error: BaseException | None = None
        deadline = anyio.current_time() + self.address.start_timeout
        with anyio.CancelScope(deadline=deadline) as scope:
            stopper = asyncio.create_task(stop.wait())
            stopper.add_done_callback(
                lambda _: scope.cancel() if stop.is_set() and not session.done() else None
            )
            try:
                self._refuse_missing_command()
                transport = self._http() if self.address.url else self._stdio(ended)
                async with Client(transport) as client:
                    scope.deadline = math.inf
                    if not session.done():
                        session.set_result(client)
                    await stop.wait()
            except Exception as caught:
                error = caught
            finally:
                stopper.cancel()
        self._forget(session)
        if not session.done():
            late = f"no answer in {self.address.start_timeout:g} s: raise start_timeout"
            session.set_exception(self._fault(late if error is None else _reason(error)))
            session.exception()  # nobody may be waiting any more

    def _refuse_missing_command(self) -> None:
        command = self.address.command
        path = dict(self.address.env).get("PATH", os.environ.get("PATH"))
        if command and shutil.which(command[0], path=path) is None:
            raise FileNotFoundError(f"the command {command[0]!r} was not found")

    def _fault(self, reason: str) -> EnvironmentFault:
        said = f"\nIts stderr ended with:\n{self._stderr}" if self._stderr else ""
        return EnvironmentFault(f"MCP server {str(self.address)!r} does not start: {reason}{said}")

    @asynccontextmanager
    async def _stdio(self, ended: Callable[[], None]) -> AsyncIterator[Any]:
        from mcp.client.stdio import StdioServerParameters, stdio_client

        command = list(self.address.command)
        if sys.platform == "linux" and sys.executable:
            guard = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid())]
            command = [*guard, *command]
        parameters = StdioServerParameters(
            command=command[0], args=command[1:], env=dict(self.address.env), cwd=self.address.cwd
        )
        stderr = _Stderr()
        try:
            with os.fdopen(stderr.write, "w") as theirs:
                async with stdio_client(parameters, errlog=theirs) as (read, write):
                    theirs.close()  # the server has it
                    yield _Watched(read, ended), write
        finally:
            self._stderr = stderr.close()

    @asynccontextmanager
    async def _http(self) -> AsyncIterator[Any]:
        import httpx2
        from mcp.client.streamable_http import streamable_http_client

        client = httpx2.AsyncClient(
            headers=dict(self.address.headers),
            timeout=httpx2.Timeout(30.0, read=None, pool=None),  # a tool has its own timeout
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=100),
        )
        assert self.address.url is not None
        async with client, streamable_http_client(self.address.url, http_client=client) as streams:
            yield streams


def _is_lost(error: Any) -> bool:
    from mcp.types import CONNECTION_CLOSED

    return error.code == CONNECTION_CLOSED or _was_not_run(error)


def _was_not_run(error: Any) -> bool:
    """Whether a server that was restarted says that it does not know the session."""
    from mcp.types import INVALID_REQUEST

    return bool(error.code == INVALID_REQUEST and error.message == "Session terminated")


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class Home:
    """The loop of this process's connections, and the connections that environments share."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._shared: dict[Address, Connection] = {}
        self._all: WeakSet[Connection] = WeakSet()
        threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True).start()

    def connection(self, address: Address) -> Connection:
        """A connection of somebody's own."""
        connection = Connection(address)
        with self._lock:
            self._all.add(connection)
        return connection

    def shared(self, address: Address) -> Connection:
        """The one that all of this process share."""
        with self._lock:
            found = self._shared.get(address)
        if found is None:
            made = self.connection(address)
            with self._lock:
                found = self._shared.setdefault(address, made)
        return found

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine on the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def soon(self, function: Callable[[], None]) -> None:
        """Calls a function on the loop, in the order of these calls and those of `submit`."""
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Ends all sessions and waits for their servers."""
        with self._lock:
            everything = list(self._all)

        async def close_all() -> None:
            await asyncio.gather(*(c.close() for c in everything), return_exceptions=True)

        with suppress(TimeoutError):
            self.submit(close_all()).result(_EXIT_SECONDS)


_home: Home | None = None
_home_lock = threading.Lock()
_tasks: set[asyncio.Future[None]] = set()  # or they may be collected before they are done


def home() -> Home:
    """This process's, made when it is first needed."""
    global _home
    with _home_lock:
        if _home is None:
            _home = Home()
        return _home


def _close_home() -> None:
    if _home is not None:
        _home.close()


def _forget_home() -> None:
    """In a forked child, where the parent's thread does not run."""
    global _home, _home_lock
    _home, _home_lock = None, threading.Lock()


atexit.register(_close_home)
os.register_at_fork(after_in_child=_forget_home)
