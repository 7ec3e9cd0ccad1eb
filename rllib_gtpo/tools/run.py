"""Running tool calls.  Whatever a tool does becomes a `ToolResult`; nothing here raises for it.

Only a tool that cannot work here at all (no sandbox, no server) raises: that says nothing about
the policy.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rllib_gtpo.errors import EnvironmentFault
from rllib_gtpo.sandbox.limits import SandboxUnavailable
from rllib_gtpo.sandbox.output import clip
from rllib_gtpo.tools.schema import Tool
from rllib_gtpo.tools.text import is_quick, to_text
from rllib_gtpo.tools.threads import start
from rllib_gtpo.types import ToolCall, ToolError, ToolResult

BROKEN = (SandboxUnavailable, EnvironmentFault)  # what is no fault of the policy
Outcome = tuple[ToolResult | None, BaseException | None]  # a result, or what must propagate


def _result(tool: Tool, value: Any, limit: int) -> ToolResult:
    """A tool may also return a ToolResult, to say itself that something failed."""
    if isinstance(value, ToolResult):
        return ToolResult(tool.name, to_text(value.content, limit), value.error)
    return ToolResult(tool.name, to_text(value, limit))


def _raised(tool: Tool, error: BaseException, limit: int) -> ToolResult:
    text = f"Error: {type(error).__name__}"
    try:
        message = to_text(str(error), max(0, limit - len(text) - 2))
    except Exception:
        message = ""
    return ToolResult(tool.name, f"{text}: {message}" if message else text, ToolError.RAISED)


def _call(tool: Tool, arguments: Mapping[str, Any], limit: int) -> Outcome:
    """Call a synchronous tool, in a thread."""
    try:
        return _result(tool, tool.fn(**tool.convert(arguments)), limit), None
    except BROKEN as error:
        return None, error
    except BaseException as error:
        return _raised(tool, error, limit), None


async def _acall(tool: Tool, arguments: Mapping[str, Any], limit: int) -> Outcome:
    """Call an asynchronous tool, in a task of its own."""
    try:
        value = await tool.fn(**tool.convert(arguments))
        if isinstance(value, ToolResult) or is_quick(value):
            return _result(tool, value, limit), None
        constant = replace(tool, fn=lambda: value)  # to write it may take a while
        outcome: Outcome = await start(
            lambda: _call(constant, {}, limit), asyncio.get_running_loop()
        )
        return outcome
    except BROKEN as error:
        return None, error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return _raised(tool, error, limit), None  # the tool's own doing
    except BaseException as error:
        user = threading.current_thread() is threading.main_thread()
        if isinstance(error, KeyboardInterrupt) and user:
            return None, error  # Ctrl-C comes to whatever runs there
        return _raised(tool, error, limit), None


async def run_tool(
    tool: Tool, arguments: Mapping[str, Any], *, timeout: float, output_chars: int
) -> ToolResult:
    """Call `tool` with arguments that passed its check.

    The tool's own `timeout` and `output_chars` go before those given.  A synchronous tool runs in a
    daemon thread; one that does not return in time is abandoned, for a thread cannot be killed, so
    code that may hang belongs in a sandbox.  An asynchronous tool is cancelled, and abandoned if it
    ignores that.

    Returns:
        The result: error RAISED with "Error: TypeName: message" if the tool raised (SystemExit
        included), TIMEOUT if it did not return.  Content beyond `output_chars` loses its middle.

    Raises:
        KeyboardInterrupt: It came to an asynchronous tool in the main thread: the user's Ctrl-C.
        SandboxUnavailable, EnvironmentFault: The tool cannot work here, for which the policy must
            not be blamed.
        asyncio.CancelledError: The caller was cancelled.
    """
    seconds = timeout if tool.timeout is None else tool.timeout
    limit = output_chars if tool.output_chars is None else tool.output_chars
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    future: asyncio.Future[Outcome]
    if tool.is_async:
        future = loop.create_task(_acall(tool, arguments, limit))
    else:
        future = start(lambda: _call(tool, arguments, limit), loop)
    try:
        done, _ = await asyncio.wait((future,), timeout=seconds)
    except BaseException:
        future.cancel()
        raise
    if done:
        result, error = future.result()
        if error is not None:
            raise error
        assert result is not None
    else:
        future.cancel()
        text = f"Error: timed out after {seconds:g} s"
        result = ToolResult(tool.name, text, ToolError.TIMEOUT)
    result.content = clip(result.content, limit)
    result.seconds = time.perf_counter() - began
    return result


async def run_calls(
    tools: Mapping[str, Tool], calls: Sequence[ToolCall], *, timeout: float, output_chars: int
) -> list[ToolResult]:
    """Run the calls of one turn concurrently; the results are in the order of the calls.

    A call that cannot be parsed, names no tool, or violates the schema gets INVALID with the reason
    and is not run.
    """
    if len(calls) == 1:
        return [await _run_call(tools, calls[0], timeout, output_chars)]
    return await asyncio.gather(*(_run_call(tools, c, timeout, output_chars) for c in calls))


async def _run_call(
    tools: Mapping[str, Tool], call: ToolCall, timeout: float, output_chars: int
) -> ToolResult:
    problem = call.error
    tool = tools.get(call.name)
    if problem is None and tool is None:
        available = ", ".join(f"'{name}'" for name in tools) or "none"
        problem = f"unknown tool '{call.name}', available: {available}"
    elif problem is None and tool is not None:
        problem = tool.check(call.arguments)
    if problem is not None or tool is None:
        text = clip(to_text(f"Error: {problem}"), output_chars)
        return ToolResult(call.name, text, ToolError.INVALID)
    return await run_tool(tool, call.arguments, timeout=timeout, output_chars=output_chars)
