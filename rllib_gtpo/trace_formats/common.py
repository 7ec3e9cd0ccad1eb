"""What the formats share: rows, calls, and what the assistant says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from rllib_gtpo.traces import UnusableRow
from rllib_gtpo.types import Message


def trajectory_row(source: dict[str, Any], messages: list[Message], tools: Any) -> dict[str, Any]:
    """A row of a trajectory file, with the name and the system message of its source."""
    row: dict[str, Any] = {}
    name = source.get("instance_id", source.get("id"))
    if name is not None:
        row["id"] = name
    if source.get("system"):
        row["system"] = source["system"]
    if tools:
        row["tools"] = _without_nulls(tools)
    return {**row, "messages": messages}


def _without_nulls(value: Any) -> Any:
    """Parquet gives every tool the parameters of all, as nulls."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def decoded(value: Any, what: str, number: int | None = None) -> Any:
    """What text encodes as JSON; anything but text is taken as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise UnusableRow(f"{what} is not JSON.", number) from error


def tool_call(name: Any, arguments: Any, id: Any = None) -> dict[str, Any]:
    """A call as messages hold it; `arguments` is an object or its JSON."""
    own = {} if id is None else {"id": id}
    return {**own, "type": "function", "function": {"name": name, "arguments": arguments}}


def say(messages: list[Message], text: str, calls: Iterable[dict[str, Any]], **more: str) -> None:
    """Adds what the assistant said; calls without text belong to what it said just before."""
    calls = list(calls)
    if calls and not text.strip() and messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).extend(calls)
        return
    own = {"tool_calls": calls} if calls else {}
    messages.append({"role": "assistant", "content": text, **own, **more})
