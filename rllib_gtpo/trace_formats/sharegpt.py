"""ShareGPT: {"conversations": [{"from": ..., "value": ...}], "tools", "system"}.

Calls are entries from "function_call" (LLaMA-Factory), or <tool_call> in the text (Hermes).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rllib_gtpo.chat import call_format
from rllib_gtpo.trace_formats.common import decoded, say, tool_call, trajectory_row
from rllib_gtpo.traces import UnusableRow, text_of
from rllib_gtpo.types import Message

_HERMES = call_format("hermes")


def from_sharegpt(row: Any) -> dict[str, Any]:
    """A row of ShareGPT's form."""
    entries = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(entries, list):
        raise UnusableRow("has no list 'conversations'.")
    messages: list[Message] = []
    for number, entry in enumerate(entries, start=1):
        speaker = entry.get("from") if isinstance(entry, dict) else None
        if speaker not in _SPEAKERS:
            raise UnusableRow(f"unknown speaker {speaker!r}.", number)
        _SPEAKERS[speaker](messages, text_of(entry.get("value"), number), number)
    return trajectory_row(row, messages, decoded(row.get("tools") or None, "tools"))


def _plain(role: str) -> Callable[[list[Message], str, int], None]:
    return lambda messages, text, number: messages.append({"role": role, "content": text})


def _gpt(messages: list[Message], text: str, number: int) -> None:
    parsed = _HERMES.parse(text, [])
    if not parsed.calls:
        return say(messages, text, ())
    for call in parsed.calls:
        if call.error is not None:
            raise UnusableRow(f"{call.error}.", number)
    more = {"reasoning_content": parsed.thinking} if parsed.thinking.strip() else {}
    say(messages, parsed.content, [tool_call(c.name, c.arguments) for c in parsed.calls], **more)


def _function_call(messages: list[Message], text: str, number: int) -> None:
    parsed = _HERMES.parse(text, [])
    if parsed.calls:
        return _gpt(messages, text, number)
    data = decoded(parsed.content, "a function_call", number)
    calls = []
    for one in data if isinstance(data, list) else [data]:
        arguments = one.get("arguments", one.get("parameters")) if isinstance(one, dict) else None
        if arguments is None or not isinstance(one.get("name"), str):
            raise UnusableRow('a function_call is not {"name": ..., "arguments": ...}.', number)
        calls.append(tool_call(one["name"], arguments))
    more = {"reasoning_content": parsed.thinking} if parsed.thinking.strip() else {}
    say(messages, "", calls, **more)


def _observation(messages: list[Message], text: str, number: int) -> None:
    wrapped = re.findall(r"<tool_response>\n?(.*?)\n?</tool_response>", text, re.S)
    messages += [{"role": "tool", "content": content} for content in wrapped or [text]]


_SPEAKERS: dict[Any, Callable[[list[Message], str, int], None]] = {
    "system": _plain("system"),
    **dict.fromkeys(("human", "user"), _plain("user")),
    **dict.fromkeys(("gpt", "assistant", "model"), _gpt),
    "function_call": _function_call,
    **dict.fromkeys(("observation", "tool", "function_response"), _observation),
}
