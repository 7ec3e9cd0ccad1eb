"""Calls as fenced code blocks, for models that have no format of their own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rllib_gtpo.chat.formats.base import CallFormat, ParsedTurn, register_call_format
from rllib_gtpo.chat.formats.scan import opening, take_apart
from rllib_gtpo.types import ToolCall

_FENCE = "```"
_OPENING = opening(r"```(?P<language>[^\n`]*)\n", quotes=False)


@register_call_format("fenced")
class FencedFormat(CallFormat):
    """A fenced code block whose language is a tool's name; its text is the tool's first parameter.

    A block in another language is a call only by mistake: it counts (as invalid) where it ends the
    turn and no valid call is there.  A fence of a tool that is never closed is invalid.
    """

    explained = False

    def parse(
        self, text: str, tools: Sequence[dict[str, Any]], *, thinking: bool = False
    ) -> ParsedTurn:
        """See CallFormat."""
        parameters = {t["function"]["name"]: _first_parameter(t) for t in tools}
        stray: list[ToolCall] = []
        last = len(text.rstrip())

        def read(text: str, match: re.Match[str]) -> tuple[int, list[ToolCall] | None]:
            language, start = match.group("language").strip(), match.end()
            close = text.find(_FENCE, start)
            end = len(text) if close < 0 else close + len(_FENCE)
            raw = text[match.start() : end]
            if language in parameters and close < 0:
                error = f"the block is not closed with {_FENCE}"
                return end, [ToolCall(language, raw=raw, error=error)]
            if language in parameters:
                code = text[start:close].removesuffix("\n")
                return end, [ToolCall(language, {parameters[language]: code}, raw)]
            if end >= last and parameters:
                known = ", ".join(f"{_FENCE}{name}" for name in parameters)
                error = f"{language!r} is not a tool; start the block with {known}"
                stray.append(ToolCall(language, raw=raw, error=error))
            return end, None

        turn = take_apart(text, _OPENING, read, thinking=thinking)
        if not turn.calls and stray:
            turn.calls = stray[-1:]
            turn.content = turn.content.removesuffix(stray[-1].raw.rstrip()).strip()
        return turn

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        return f"{_FENCE}{call.name}\n{next(iter(call.arguments.values()), '')}\n{_FENCE}"


def _first_parameter(tool: dict[str, Any]) -> str:
    properties = tool["function"].get("parameters", {}).get("properties", {})
    return next(iter(properties), "")
