"""Calls as bare JSON: Llama 3.1 and later."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rllib_gtpo.chat.formats.base import (
    THINKING,
    CallFormat,
    ParsedTurn,
    call_of,
    register_call_format,
)
from rllib_gtpo.chat.formats.scan import opening, take_apart
from rllib_gtpo.types import ToolCall

_TAG = "<|python_tag|>"
_OPENING = opening(r"<\|python_tag\|>|(?:^|(?<=</think>)|(?<=\[/THINK\]))[ \t]*(?=\{)")
_MEANT = re.compile(r'\s*\{\s*"name"\s*:')
_NEXT = re.compile(r"\s*+;?+\s*+(?=\{)")
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()
_FAILURES = 8  # objects that cannot be read and are passed over: each may cost the whole text


@register_call_format("llama3_json")
class Llama3Format(CallFormat):
    """`{"name": ..., "parameters": {...}}`, perhaps behind `<|python_tag|>`; several with `;`.

    A call begins a line.  An object that is not a call (no name, or other keys) is text, unless it
    stands behind the tag; one that cannot be read is an invalid call where it begins with a name
    and the turn begins with it.
    """

    ends = ("<|eom_id|>",)

    def parse(
        self, text: str, tools: Sequence[dict[str, Any]], *, thinking: bool = False
    ) -> ParsedTurn:
        """See CallFormat."""
        failures = 0

        def read(text: str, match: re.Match[str]) -> tuple[int, list[ToolCall] | None]:
            nonlocal failures
            tagged = match.group("call") == _TAG
            first = tagged or _nothing_before(text, match.start())
            if failures >= _FAILURES and not first:
                return match.end() + 1, None
            end, calls, error = _sequence(text, match.end(), tagged)
            if calls:
                calls[0].raw = text[match.start() : match.end()] + calls[0].raw
            if error is not None:
                failures += 1
                if tagged or calls or (first and _MEANT.match(text, match.end())):
                    start = end if calls else match.start()
                    calls.append(ToolCall("", raw=text[start:], error=error))
                    return len(text), calls
                return match.end() + 1, None
            return end, calls or None

        return take_apart(text, _OPENING, read, thinking=thinking)

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        return json.dumps({"name": call.name, "parameters": call.arguments}, ensure_ascii=False)

    def write_all(self, calls: Sequence[ToolCall]) -> str:
        """See CallFormat."""
        return "; ".join(map(self.write, calls))


def _sequence(text: str, start: int, tagged: bool) -> tuple[int, list[ToolCall], str | None]:
    """The calls from `start` on, where they end, and why the next one cannot be read, if so."""
    calls: list[ToolCall] = []
    space = _SPACE.match(text, start)
    at = start if space is None else space.end()
    end = start
    while True:
        try:
            data, after = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            meant = tagged or bool(_MEANT.match(text, at))
            wrong = f"the call is not JSON: {error}" if meant or not calls else None
            return end, calls, wrong
        if _is_call(data):
            key = "parameters" if "parameters" in data else "arguments"
            calls.append(call_of(data, text[end if calls else start : after], key))
        elif tagged and not calls:
            return start, [], 'the call must be {"name": ..., "parameters": {...}}'
        else:
            return (end if calls else after), calls, None
        end = after
        more = _NEXT.match(text, after)
        if more is None:
            return end, calls, None
        at = more.end()


def _is_call(data: Any) -> bool:
    """Whether an object can be nothing else than a call."""
    return (
        isinstance(data, dict)
        and isinstance(data.get("name"), str)
        and ("parameters" in data or "arguments" in data)
        and data.keys() <= {"name", "parameters", "arguments", "type", "id"}
    )


def _nothing_before(text: str, end: int) -> bool:
    """Whether only space or the end of thinking precedes."""
    before = text[max(0, end - 200) : end].rstrip()
    return not before or before.endswith(tuple(closing for _, closing in THINKING))
