"""Running tool calls.  Whatever a tool does becomes a `ToolResult`; nothing here raises for it.

Only a machine that cannot run code at all raises: that says nothing about the policy.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rllib_gtpo.sandbox.limits import SandboxUnavailable
from rllib_gtpo.sandbox.output import clip
from rllib_gtpo.tools.schema import Tool
from rllib_gtpo.tools.threads import start
from rllib_gtpo.types import ToolCall, ToolError, ToolResult

Outcome = tuple[ToolResult | None, BaseException | None]  # a result, or what must propagate


def to_text(value: Any) -> str:
    """What the policy sees of a tool's return value: a string as it is, all else as JSON.

    What JSON cannot express appears as its `repr`.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()  # no lone surrogates
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def _result(tool: Tool, value: Any) -> ToolResult:
    """A tool may also return a ToolResult, to say itself that something failed."""
    if isinstance(value, ToolResult):
        return ToolResult(tool.name, to_text(value.content), value.error)
    return ToolResult(tool.name, to_text(value))


def _raised(tool: Tool, error: BaseException) -> ToolResult:
    kind = type(error).__name__
    try:
        message = to_text(str(error))
    except Exception:
        message = ""
    text = f"Error: {kind}: {message}" if message else f"Error: {kind}"
    return ToolResult(tool.name, text, ToolError.RAISED)


def _call(tool: Tool, arguments: Mapping[str, Any]) -> Outcome:
    """Call a synchronous tool, in a thread."""
    try:
        return _result(tool, tool.fn(**tool.convert(arguments))), None
    except (KeyboardInterrupt, SandboxUnavailable) as error:
        return None, error
    except BaseException as error:
        return _raised(tool, error), None


async def _acall(tool: Tool, arguments: Mapping[str, Any]) -> Outcome:
    """Call an asynchronous tool, in a task of its own."""
    try:
        return _result(tool, await tool.fn(**tool.convert(arguments))), None
    except (KeyboardInterrupt, SandboxUnavailable) as error:
        return None, error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return _raised(tool, error), None  # the tool's own doing
    except BaseException as error:
        return _raised(tool, error), None


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
        KeyboardInterrupt: As the tool raised it.
        SandboxUnavailable: Code cannot be run here, for which the policy must not be blamed.
        asyncio.CancelledError: The caller was cancelled.
    """
    seconds = timeout if tool.timeout is None else tool.timeout
    limit = output_chars if tool.output_chars is None else tool.output_chars
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    future: asyncio.Future[Outcome]
    if tool.is_async:
        future = loop.create_task(_acall(tool, arguments))
    else:
        future = start(lambda: _call(tool, arguments), loop)
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
