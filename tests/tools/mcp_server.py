"""An MCP server with every kind of answer and failure: `python mcp_server.py [PORT]`."""

import asyncio
import os
import sys
import threading
import time
from typing import Annotated

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import BaseModel, Field

server = MCPServer("testing")
counted = 0


class Point(BaseModel):
    x: int
    y: int = 0


@server.tool()
def count(by: int = 1) -> str:
    """Count, for as long as the server lives."""
    global counted
    counted += by
    return str(counted)


@server.tool()
def pid() -> str:
    """Which process this is."""
    return str(os.getpid())


@server.tool()
def crash() -> str:
    """End the server."""
    print("as you like it", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
async def sleep(seconds: float) -> str:
    """Sleep."""
    await asyncio.sleep(seconds)
    return "slept"


@server.tool()
def linger() -> str:
    """From now on, do not end with the standard input."""
    threading.Thread(target=time.sleep, args=(120,)).start()
    return str(os.getpid())


@server.tool()
def picture() -> list:
    """Text and a picture."""
    return ["a dot:", Image(data=b"\x89PNG" * 3, format="png")]


@server.tool()
def fail(how: str) -> str:
    """Fail."""
    raise ToolError(how)


@server.tool()
def long(characters: int) -> str:
    """A long text."""
    return "a" + "x" * characters + "z"


@server.tool(name="geometry.norm")
def norm(point: Point, power: Annotated[int, Field(ge=1, le=4)] = 2) -> float:
    """The norm of a point."""
    return float(abs(point.x) ** power + abs(point.y) ** power) ** (1 / power)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run()
