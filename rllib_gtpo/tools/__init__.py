"""Plain typed functions, and the tools of MCP servers, as tools of an environment."""

from rllib_gtpo.tools.mcp import MCPServer, mcp_tools
from rllib_gtpo.tools.python import PythonSession, to_tool_result
from rllib_gtpo.tools.run import run_calls, run_tool
from rllib_gtpo.tools.schema import Tool, ToolSchemaError, tool
from rllib_gtpo.tools.text import to_text

__all__ = [
    "MCPServer",
    "PythonSession",
    "Tool",
    "ToolSchemaError",
    "mcp_tools",
    "run_calls",
    "run_tool",
    "to_text",
    "to_tool_result",
    "tool",
]
