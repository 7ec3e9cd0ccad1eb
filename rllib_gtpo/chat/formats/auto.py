"""The format that a template itself writes, and the choice of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rllib_gtpo.chat.formats.base import (
    OPENINGS,
    CallFormat,
    ParsedTurn,
    call_formats,
    register_call_format,
)
from rllib_gtpo.chat.template import PROBE, ChatTemplate, call
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.types import ToolCall

_NAME = "lookup"
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    },
}


@dataclass(frozen=True)
class Native:
    """The format in which a template writes calls, and a call that it has written."""

    name: str
    written: str
    thinking: bool

    def same(self, form: CallFormat) -> bool:
        """Whether `form` reads what the template writes."""
        read = form.parse(self.written, [_TOOL], thinking=self.thinking).calls
        return [(c.name, c.arguments, c.error) for c in read] == [(_NAME, {"query": PROBE}, None)]


def native_format(template: ChatTemplate) -> Native | None:
    """The registered format that a template writes calls in; None if there is none."""
    written = _written(template)
    if written is None:
        return None
    thinking = template.header.rstrip().endswith(OPENINGS)
    found: list[tuple[bool, Native]] = []
    for name, form in call_formats().items():
        if form.explained and form.fixed:
            native = Native(name, written, thinking)
            if native.same(form):
                own = form.write(ToolCall(_NAME, {"query": PROBE}))
                found.append(("".join(own.split()) in "".join(written.split()), native))
    return max(found, key=lambda one: one[0])[1] if found else None


def _written(template: ChatTemplate) -> str | None:
    """What the template makes of a structured call."""
    if not template.writes_calls:
        return None
    message = {"role": "assistant", "content": "", "tool_calls": [call(0, _NAME)]}
    plain = template.canonical(message)
    if plain is not None:
        return plain
    return template.canonical(message | {"reasoning_content": "hm", "thinking": "hm"})


@register_call_format("auto")
class AutoFormat(CallFormat):
    """What the tokenizer's response template reads, or else the format that its template writes."""

    fixed = False

    def bind(self, template: ChatTemplate) -> CallFormat:
        """See CallFormat."""
        if getattr(template.tokenizer, "response_template", None):
            return call_formats()["response_template"].bind(template)
        native = native_format(template)
        if native is None:
            raise ConfigError(
                "call_format='auto': the tokenizer has no response template, and the chat template "
                "writes no calls that a known format reads; set call_format= to one of "
                f"{', '.join(name for name, form in call_formats().items() if form.fixed)}."
            )
        return call_formats()[native.name]

    def parse(
        self, text: str, tools: Sequence[dict[str, Any]], *, thinking: bool = False
    ) -> ParsedTurn:
        """See CallFormat."""
        raise ConfigError("call_format='auto' is chosen with a tokenizer: use ChatCodec's.")

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        raise ConfigError("call_format='auto' is chosen with a tokenizer: use ChatCodec's.")
