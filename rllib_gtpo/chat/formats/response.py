"""Calls as the tokenizer itself says that they are read: transformers' response templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rllib_gtpo.chat.formats.base import (
    OPENINGS,
    CallFormat,
    ParsedTurn,
    call_of,
    register_call_format,
)
from rllib_gtpo.chat.template import ChatTemplate, call_id
from rllib_gtpo.errors import ChatTemplateError, ConfigError
from rllib_gtpo.types import ToolCall

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_MISSING = (
    "call_format='response_template': the tokenizer has no response_template; set it "
    "(tokenizer.response_template, saved in tokenizer_config.json), or use another call_format."
)


@register_call_format("response_template")
class ResponseFormat(CallFormat):
    """What `tokenizer.parse_response` finds; calls are written as the chat template does.

    Where the response template cannot read a turn, all of it is an invalid call.
    """

    fixed = False

    def __init__(self, template: ChatTemplate | None = None) -> None:
        self._template = template

    def bind(self, template: ChatTemplate) -> CallFormat:
        """See CallFormat."""
        if not getattr(template.tokenizer, "response_template", None):
            raise ConfigError(_MISSING)
        bound = ResponseFormat(template)
        bound.name = self.name
        return bound

    def parse(
        self, text: str, tools: Sequence[dict[str, Any]], *, thinking: bool = False
    ) -> ParsedTurn:
        """See CallFormat."""
        template = self._bound
        prompt = template.header
        opened = next((o for o in OPENINGS if prompt.rstrip().endswith(o)), None)
        if opened is not None and not thinking:
            prompt = prompt.rstrip().removesuffix(opened)
        turns = [self.parse_sampled(text, tools, prompt=prompt, end=end) for end in template.ends]
        return max(turns, key=lambda turn: (bool(turn.calls), not _wrong(turn)))

    def parse_sampled(
        self, text: str, tools: Sequence[dict[str, Any]], *, prompt: str, end: str
    ) -> ParsedTurn:
        """See CallFormat."""
        tokenizer = self._bound.tokenizer
        try:
            parser = tokenizer.get_response_parser(prefix=prompt, tools=list(tools) or None)
            parser.feed(text + end)
            message, last = parser.finalize()
            if any(e["type"] == "region_close" and e["field"] == "tool_calls" for e in last):
                # Closed only because the text ends, or because more of a mark could have followed.
                parser = tokenizer.get_response_parser(prefix=prompt, tools=list(tools) or None)
                closed = parser.feed(text + end + "\n.")
                count = sum(
                    e["type"] == "region_close" and e["field"] == "tool_calls" for e in closed
                )
                if count < len(message.get("tool_calls") or ()):
                    raise ValueError("it is not closed")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            error_text = f"the call cannot be read: {str(error)[:300]}"
            return ParsedTurn("", calls=[ToolCall("", raw=text, error=error_text)])
        calls = [self._call(one, text) for one in message.get("tool_calls") or ()]
        thoughts = [str(message[key]) for key in _THOUGHTS if message.get(key)]
        content = message.get("content")
        said = content.strip() if isinstance(content, str) else ""
        return ParsedTurn(said, "".join(thoughts), calls)

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        return self.write_all([call])

    def write_all(self, calls: Sequence[ToolCall]) -> str:
        """See CallFormat."""
        structured = [
            {
                "id": one.id or call_id(index),
                "type": "function",
                "function": {"name": one.name, "arguments": one.arguments},
            }
            for index, one in enumerate(calls)
        ]
        message = {"role": "assistant", "content": "", "tool_calls": structured}
        text = self._bound.canonical(message)
        if text is None or not self._bound.writes_calls:
            raise ChatTemplateError(
                "The chat template writes no calls behind its own generation prompt, so that they "
                "cannot be demonstrated: set chat_template= to one that does."
            )
        return text

    @property
    def _bound(self) -> ChatTemplate:
        if self._template is None:
            raise ConfigError("call_format='response_template' needs a tokenizer: use ChatCodec's.")
        return self._template

    @staticmethod
    def _call(given: Any, raw: str) -> ToolCall:
        function = given.get("function") if isinstance(given, dict) else None
        call = call_of(function, raw)
        known = given.get("id") if isinstance(given, dict) else None
        if isinstance(known, str):
            call.id = known
        return call


def _wrong(turn: ParsedTurn) -> bool:
    return any(call.error is not None for call in turn.calls)
