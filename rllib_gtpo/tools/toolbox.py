"""The tools that an environment lists, ready to be called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rllib_gtpo.tools.mcp import MCPServer, ServerTools
from rllib_gtpo.tools.schema import Tool, ToolSchemaError

ToolSource = Callable[..., Any] | Tool | str | MCPServer
"""What `tools` may hold: a typed function or method, "package.module:function", a server."""


class Toolbox:
    """The tools of one environment; MCP servers start when they are first needed."""

    def __init__(self, env: Any, sources: Sequence[ToolSource]) -> None:
        """Functions of the class of `env` become its methods.

        Raises:
            ToolSchemaError: A function cannot be a tool, or two have one name.
        """
        self._owner = type(env).__name__
        self._waiting = [s for s in sources if isinstance(s, MCPServer)]
        self._functions = [(s, _as_tool(env, s)) for s in sources if not isinstance(s, MCPServer)]
        self._servers: list[ServerTools] = []
        self._tools = self._by_name(self._functions)

    @property
    def tools(self) -> dict[str, Tool]:
        """All by name."""
        if self._waiting and not self._servers:
            self._servers = [ServerTools(server, self) for server in self._waiting]
            served = [(s.server, tool) for s in self._servers for tool in s.tools]
            self._tools = self._by_name([*self._functions, *served])
        return self._tools

    def begin_trajectory(self) -> None:
        """Servers with a connection for each trajectory know nothing of the last one."""
        for server in self._servers:
            server.begin_trajectory()

    def close(self) -> None:
        """The environment needs no server, until its tools are used again."""
        for server in self._servers:
            server.close()
        self._servers = []

    def _by_name(self, given: Iterable[tuple[ToolSource, Tool]]) -> dict[str, Tool]:
        tools: dict[str, Tool] = {}
        sources: dict[str, ToolSource] = {}
        for source, tool in given:
            if tool.name in tools:
                raise ToolSchemaError(
                    f"{self._owner}.tools has two tools named {tool.name!r}: "
                    f"{sources[tool.name]!r} and {source!r}.  Rename one: @tool(name=...), or "
                    "MCPServer(prefix=...)."
                )
            tools[tool.name], sources[tool.name] = tool, source
        return tools


def _as_tool(env: Any, source: Any) -> Tool:
    """A function is a tool; a function of the class body is a method, so it is bound first."""
    if isinstance(source, Tool):
        return source
    if isinstance(source, str):
        return Tool.from_path(source)
    name = getattr(source, "__name__", "")
    is_method = inspect.getattr_static(type(env), name, None) is source
    return Tool.from_function(getattr(env, name) if is_method else source)
