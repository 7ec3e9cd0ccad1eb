"""Calls as JSON between tags: Hermes, Qwen2.5 and Qwen3 models."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rllib_gtpo.chat.formats.base import CallFormat, ParsedTurn, call_of, register_call_format
from rllib_gtpo.chat.formats.scan import opening, take_apart
from rllib_gtpo.types import ToolCall

_CLOSE = "</tool_call>"
_OPENING = opening("<tool_call>")
_AFTER = re.compile(r"\s*</tool_call>")
_DECODER = json.JSONDecoder()


@register_call_format("hermes")
class HermesFormat(CallFormat):
    """`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

    def parse(
        self, text: str, tools: Sequence[dict[str, Any]], *, thinking: bool = False
    ) -> ParsedTurn:
        """See CallFormat."""
        return take_apart(text, _OPENING, _read, thinking=thinking)

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        data = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
        return f"<tool_call>\n{data}\n</tool_call>"


def _read(text: str, match: re.Match[str]) -> tuple[int, list[ToolCall]]:
    start = match.end()
    close = text.find(_CLOSE, start)
    if close < 0:
        error = f"the call is not closed; end it with {_CLOSE}"
        return len(text), [ToolCall("", raw=text[match.start() :], error=error)]
    end = close + len(_CLOSE)
    try:
        data = json.loads(text[start:close])
    except (ValueError, RecursionError) as error:
        whole = _around_a_close(text, start)
        if whole is None:
            raw = text[match.start() : end]
            return end, [ToolCall("", raw=raw, error=f"the call is not JSON: {error}")]
        data, end = whole
    return end, [call_of(data, text[match.start() : end])]


def _around_a_close(text: str, start: int) -> tuple[Any, int] | None:
    """A call one of whose strings contains the closing tag."""
    rest = text[start:].lstrip()  # a copy, since an error counts the lines of all that is before it
    try:
        data, size = _DECODER.raw_decode(rest)
    except (ValueError, RecursionError):
        return None
    after = _AFTER.match(rest, size)
    return None if after is None else (data, len(text) - len(rest) + after.end())
