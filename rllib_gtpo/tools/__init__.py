"""Plain typed functions as tools."""

from rllib_gtpo.tools.python import PythonSession, to_tool_result
from rllib_gtpo.tools.run import run_calls, run_tool, to_text
from rllib_gtpo.tools.schema import Tool, ToolSchemaError

__all__ = [
    "PythonSession",
    "Tool",
    "ToolSchemaError",
    "run_calls",
    "run_tool",
    "to_text",
    "to_tool_result",
]
