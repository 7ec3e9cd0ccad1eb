"""Plain typed functions as tools."""

from rllib_gtpo.tools.python import PythonSession, to_tool_result
from rllib_gtpo.tools.run import run_calls, run_tool
from rllib_gtpo.tools.schema import Tool, ToolSchemaError, tool
from rllib_gtpo.tools.text import to_text

__all__ = [
    "PythonSession",
    "Tool",
    "ToolSchemaError",
    "run_calls",
    "run_tool",
    "to_text",
    "to_tool_result",
    "tool",
]
