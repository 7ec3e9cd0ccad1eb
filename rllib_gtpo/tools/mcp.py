"""Tools of MCP servers, through the official SDK (the extra `mcp`).

    class Clock(ToolEnv):
        tools = [MCPServer(command=["mcp-server-time"])]

A server may be a command that speaks MCP on its standard streams, or the URL of one that speaks
streamable HTTP.  Each process that runs rollouts has one connection to it, which all trajectories
share, or one for each trajectory (`per_trajectory=True`) if the server keeps state.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import finalize

from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.tools.connection import Connection, home
from rllib_gtpo.tools.schema import Tool, check_limits
from rllib_gtpo.tools.transports import Address
from rllib_gtpo.types import ToolError, ToolResult

_SDK = "MCP tools need the MCP SDK, version 2: pip install 'rllib-gtpo[mcp]'"


@dataclass(frozen=True, init=False)
class MCPServer:
    """A server whose tools an environment offers: one entry of its `tools`.

    It is only a description, equal to others like it, and can be sent to other processes.
    """

    address: Address
    prefix: str
    include: tuple[str, ...] | None
    per_trajectory: bool
    timeout: float | None
    output_chars: int | None

    def __init__(
        self,
        command: Sequence[str] | None = None,
        *,
        url: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        headers: Mapping[str, str] | None = None,
        prefix: str = "",
        include: Sequence[str] | None = None,
        per_trajectory: bool = False,
        timeout: float | None = None,
        output_chars: int | None = None,
        start_timeout: float = 60.0,
    ) -> None:
        """Nothing is started yet.

        Args:
            command: Program and arguments of a server on standard streams.
            url: Of a server that speaks streamable HTTP, such as "http://localhost:8000/mcp".
            env: Variables of the command, beyond PATH, HOME and the like: it inherits no others.
            cwd: The command's working directory.
            headers: Of every HTTP request, such as {"Authorization": "Bearer ..."}.
            prefix: Before the name of each tool, as the policy knows it.
            include: The server's own names of the tools to offer; None: all.
            per_trajectory: A connection (for a command: a process) for each trajectory, which
                begins with its first call and ends with it.
            timeout, output_chars: Limits of each tool, see `rllib_gtpo.tools.tool`.
            start_timeout: Seconds until a server must have answered for the first time.

        Raises:
            ConfigError: The settings contradict each other, or there is no MCP SDK.
        """
        _require_sdk()
        if isinstance(command, str) or (command is not None and not command):
            raise ConfigError(f"MCPServer: command={command!r} must be a list: program, arguments.")
        if (command is None) == (url is None):
            raise ConfigError("MCPServer: give either a command or a url.")
        if url is not None and (env or cwd):
            raise ConfigError("MCPServer: env and cwd are for a command, not for a url.")
        if command is not None and headers:
            raise ConfigError("MCPServer: headers are for a url, not for a command.")
        if url is not None and not re.match(r"https?://\S+$", url):
            raise ConfigError(f"MCPServer: url={url!r} must look like http://HOST:PORT/PATH.")
        for key, value in [*(env or {}).items(), *(headers or {}).items()]:
            if not isinstance(value, str):
                raise ConfigError(f"MCPServer: the value of {key!r} must be text, not {value!r}.")
        check_limits("MCPServer", timeout, output_chars)
        if not re.fullmatch(r"([A-Za-z_][A-Za-z0-9_-]*)?", prefix):
            raise ConfigError(f"MCPServer: prefix={prefix!r} must be letters, digits, _ and -.")
        address = Address(
            command=tuple(map(str, command or ())),
            url=url,
            env=tuple(sorted((env or {}).items())),
            cwd=cwd,
            headers=tuple(sorted((headers or {}).items())),
            start_timeout=float(start_timeout),
        )
        settings: dict[str, Any] = {
            "address": address,
            "prefix": prefix,
            "include": None if include is None else tuple(include),
            "per_trajectory": per_trajectory,
            "timeout": timeout,
            "output_chars": output_chars,
        }
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"MCPServer({str(self.address)!r})"  # neither variables nor headers: secrets


class ServerTools:
    """The tools of a server for as long as an owner, usually an environment, needs them."""

    def __init__(self, server: MCPServer, owner: Any) -> None:
        """Starts the server, unless it is running.

        Raises:
            EnvironmentFault: The server does not start.
            ConfigError: Its tools are not what the settings name.
        """
        self.server = server
        make = home().connection if server.per_trajectory else home().shared
        self._connection = make(server.address)
        home().soon(self._connection.join)
        self._leave = finalize(owner, _leave, self._connection)
        self._leave.atexit = False  # all connections end then
        self.tools = _described(server, self._connection)
        if server.per_trajectory:
            self.tools = [self._own(tool) for tool in self.tools]

    def begin_trajectory(self) -> None:
        """What the server knows of the last trajectory is gone, if it has a connection of its own.

        Returns at once.
        """
        if self.server.per_trajectory:
            home().submit(self._connection.close())

    def close(self) -> None:
        """The owner needs them no more; the server ends with the last one.  Returns at once."""
        self._leave()

    def _own(self, tool: Tool) -> Tool:
        assert isinstance(tool.fn, _Call)
        return replace(tool, fn=_Call(self.server, tool.fn.name, self._connection))


def _leave(connection: Connection) -> None:
    home().soon(connection.leave)


def mcp_tools(command: Sequence[str] | None = None, **settings: Any) -> list[Tool]:
    """The tools of a server, which is started for it; see `MCPServer` for the arguments.

    For use without an environment, or to choose among them.  The connection stays until the
    process exits; another process that gets the tools connects when it first calls one.
    """
    server = MCPServer(command, **settings)
    if server.per_trajectory:
        raise ConfigError("mcp_tools knows no trajectories: write tools = [MCPServer(...)].")
    connection = home().shared(server.address)
    home().soon(connection.join)
    return list(_described(server, connection))


def to_tool_result(name: str, answer: Any) -> ToolResult:
    """What a server answered as text: its text, and a note for everything that is none."""
    parts = [_text_of(block) for block in answer.content]
    if answer.structured_content is not None and not any(b.type == "text" for b in answer.content):
        parts.append(json.dumps(answer.structured_content, ensure_ascii=False))
    text = "\n".join(parts)
    if answer.is_error:
        return ToolResult(name, f"Error: {text}", ToolError.RAISED)
    return ToolResult(name, text)


def _text_of(block: Any) -> str:
    if block.type == "text":
        return str(block.text)
    if block.type == "resource_link":
        return f"[link to {block.name}: {block.uri}]"
    what, data, kind = block.type, getattr(block, "data", ""), getattr(block, "mime_type", None)
    if block.type == "resource":
        if hasattr(block.resource, "text"):
            return str(block.resource.text)
        what = f"content of {block.resource.uri}"
        data, kind = block.resource.blob, block.resource.mime_type
    return f"[{what}, {kind or 'of unknown type'}, {len(data) * 3 // 4} bytes: not shown]"


@dataclass(frozen=True)
class _Call:
    """A tool's function; by itself it uses the connection that all of the process share."""

    server: MCPServer
    name: str  # the server's own name of the tool
    connection: Connection | None = None

    async def __call__(self, /, **arguments: Any) -> ToolResult:
        connection = self.connection or home().shared(self.server.address)
        future = home().submit(connection.call(self.name, arguments))
        answer = await asyncio.wrap_future(future)
        if isinstance(answer, ToolResult):
            return answer
        return to_tool_result(self.name, answer)


class _Validator:
    """What a server's JSON schema asks beyond what every tool's arguments are checked for."""

    def __init__(self, name: str, schema: dict[str, Any]) -> None:
        self._name, self._schema = name, schema

    @cached_property
    def _validator(self) -> Any:
        from jsonschema.validators import validator_for
        from referencing import Registry

        kind = validator_for(self._schema)
        return kind(self._schema, registry=Registry())  # which fetches no references

    def __call__(self, arguments: Mapping[str, Any]) -> str | None:
        from jsonschema.exceptions import best_match

        error = best_match(self._validator.iter_errors(dict(arguments)))
        if error is None:
            return None
        where, *deeper = error.absolute_path or ("",)
        path = "".join(f" [{part!r}]" for part in deeper)
        whose = f"argument '{where}'" if where else "arguments"
        return f"{whose} of tool '{self._name}'{path}: {error.message}"

    def __reduce__(self) -> Any:
        return _Validator, (self._name, self._schema)


_known: dict[MCPServer, list[Tool]] = {}


def _described(server: MCPServer, connection: Connection) -> list[Tool]:
    """The server's tools, with calls over the shared connection; it is asked once per process."""
    if server not in _known:
        listed = home().submit(connection.list_tools()).result()
        names = [tool.name for tool in listed]
        for name in server.include or ():
            if name not in names:
                raise ConfigError(f"{server!r}: include has {name!r}{did_you_mean(name, names)}.")
        _known[server] = [
            _as_tool(server, tool)
            for tool in listed
            if server.include is None or tool.name in server.include
        ]
        if server.per_trajectory:
            home().submit(connection.close())  # its first call starts it again
    return _known[server]


def _as_tool(server: MCPServer, tool: Any) -> Tool:
    name = server.prefix + re.sub(r"[^A-Za-z0-9_-]", "_", tool.name)
    schema = {"type": "object", "properties": {}, **tool.input_schema}
    return Tool(
        name=name,
        description=(tool.description or tool.title or "").strip(),
        parameters=schema,
        fn=_Call(server, tool.name),
        is_async=True,
        timeout=server.timeout,
        output_chars=server.output_chars,
        validate=_Validator(name, schema),
    )


def _require_sdk() -> None:
    try:
        version = importlib.metadata.version("mcp")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"{_SDK}.") from None
    if version.split(".")[0] != "2":
        raise ConfigError(f"{_SDK}; this is {version}.")
