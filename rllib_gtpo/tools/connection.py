"""Connections to MCP servers, all on one event loop of the process.

Every batch of rollouts has an event loop of its own, and a connection outlives many of them: so
connections live on a loop in a daemon thread, and calls come to them from any loop or thread.
"""

from __future__ import annotations

import asyncio
import atexit
import math
import os
import threading
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakSet

from rllib_gtpo.errors import EnvironmentFault
from rllib_gtpo.tools.transports import Address, over_http, over_stdio
from rllib_gtpo.types import ToolError, ToolResult

T = TypeVar("T")

_EXIT_SECONDS = 8.0  # to wait for servers when the process exits; the SDK kills after four


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
        return ToolResult(name, text, ToolError.CRASHED)

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
                async with Client(self._transport(ended)) as client:
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

    def _transport(self, ended: Callable[[], None]) -> Any:
        if self.address.url is not None:
            return over_http(self.address)
        return over_stdio(self.address, ended, self._note_stderr)

    def _note_stderr(self, text: str) -> None:
        self._stderr = text

    def _fault(self, reason: str) -> EnvironmentFault:
        said = f"\nIts stderr ended with:\n{self._stderr}" if self._stderr else ""
        return EnvironmentFault(f"MCP server {str(self.address)!r} does not start: {reason}{said}")


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
