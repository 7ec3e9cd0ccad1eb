"""Calls behind `[TOOL_CALLS]`: Mistral models, in the older and the newer way."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rllib_gtpo.chat.formats.base import CallFormat, ParsedTurn, call_of, register_call_format
from rllib_gtpo.chat.formats.scan import opening, take_apart
from rllib_gtpo.types import ToolCall

_TAG = "[TOOL_CALLS]"
_OPENING = opening(re.escape(_TAG))
_NAMED = re.compile(
    r"\s*+(?P<name>[^\[\]{}\s]++)\s*+(?:\[CALL_ID\]\s*+(?P<id>[^\[\]{}\s]++)\s*+)?+"
    r"(?:\[ARGS\])?+\s*+(?=\{)"
)
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


@register_call_format("mistral")
class MistralFormat(CallFormat):
    """`[TOOL_CALLS] [{"name": ..., "arguments": {...}}]`; also reads what "mistral_args" writes."""

    def parse(
        self, text: str, tools: Sequence[dict[str, Any]], *, thinking: bool = False
    ) -> ParsedTurn:
        """See CallFormat."""
        return take_apart(text, _OPENING, _read, thinking=thinking)

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        return self.write_all([call])

    def write_all(self, calls: Sequence[ToolCall]) -> str:
        """See CallFormat."""
        data = [
            {
                "name": call.name,
                "arguments": call.arguments,
                **({} if call.id is None else {"id": call.id}),
            }
            for call in calls
        ]
        return _TAG + json.dumps(data, ensure_ascii=False)


@register_call_format("mistral_args")
class MistralArgsFormat(MistralFormat):
    """`[TOOL_CALLS]name[ARGS]{...}`, once for each call; also reads what "mistral" writes."""

    def write_all(self, calls: Sequence[ToolCall]) -> str:
        """See CallFormat."""
        return "".join(
            f"{_TAG}{call.name}"
            + ("" if call.id is None else f"[CALL_ID]{call.id}")
            + f"[ARGS]{json.dumps(call.arguments, ensure_ascii=False)}"
            for call in calls
        )


def _read(text: str, match: re.Match[str]) -> tuple[int, list[ToolCall]]:
    named = _NAMED.match(text, match.end())
    space = _SPACE.match(text, match.end())
    at = named.end() if named else space.end() if space else match.end()
    following = text.find(_TAG, at)
    limit = len(text) if following < 0 else following
    try:
        # A string may contain the tag; else decode no further, as an error costs what is before it.
        whole = text[at:] if '"' in text[at:limit] else text[at:limit]
        data, size = _DECODER.raw_decode(whole)
    except (ValueError, RecursionError) as error:
        end = limit
        name = named.group("name") if named else ""
        wrong = f"the call is not complete JSON, as {_TAG}[{{...}}] or {_TAG}name[ARGS]{{...}}: "
        return end, [ToolCall(name, raw=text[match.start() : end], error=wrong + str(error))]
    end = at + size
    raw = text[match.start() : end]
    if named:
        return end, [ToolCall(named.group("name"), data, raw, id=named.group("id"))]
    if not isinstance(data, list) or not data:
        error_text = f"{_TAG} must be followed by a list of calls"
        return end, [ToolCall("", raw=raw, error=error_text)]
    return end, [call_of(one, raw) for one in data]
