"""Calls as XML: Qwen3-Coder (and Qwen3.5, Nemotron 3) and GLM models.

Such a call is text only, so the tool's schema says what a value is: text where it may be a string,
else JSON.  A value ends at its closing tag where that is followed by what may follow it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

from rllib_gtpo.chat.formats.base import CallFormat, ParsedTurn, register_call_format
from rllib_gtpo.chat.formats.scan import opening, take_apart
from rllib_gtpo.types import ToolCall

_PYTHON = {"True": True, "False": False, "None": None}  # as templates write them
Schema = dict[str, Any]


class _XmlFormat(CallFormat):
    """What the two ways have in common: a head with the name, pairs, and an end."""

    _opening: ClassVar[re.Pattern[str]]
    _head: ClassVar[re.Pattern[str]]  # the name; matched where the opening mark begins
    _key: ClassVar[re.Pattern[str]]  # the key of a pair, up to its value
    _value_end: ClassVar[re.Pattern[str]]
    _end: ClassVar[re.Pattern[str]]
    _close: ClassVar[str]
    _form: ClassVar[str]
    _padded = False  # whether a line break stands on each side of a value

    def parse(
        self, text: str, tools: Sequence[dict[str, Any]], *, thinking: bool = False
    ) -> ParsedTurn:
        """See CallFormat."""
        schemas = {t["function"]["name"]: _properties(t) for t in tools}
        values_end = self._value_end.search(text) is not None

        def read(text: str, match: re.Match[str]) -> tuple[int, list[ToolCall]]:
            nonlocal values_end
            start, at = match.span()
            head = self._head.match(text, start)
            if head is None:
                return self._wrong(text, "", start, at)
            name, at = head.group("name").strip(), head.end()
            arguments: dict[str, Any] = {}
            while values_end and (key := self._key.match(text, at)):
                value_end = self._value_end.search(text, key.end())
                values_end = value_end is not None  # else no later search finds one, either
                if value_end is not None:
                    value = text[key.end() : value_end.start()]
                    parameter, at = key.group("key").strip(), value_end.end()
                    arguments[parameter] = self._value(value, schemas.get(name, {}).get(parameter))
            end = self._end.match(text, at)
            if end is None:
                return self._wrong(text, name, start, at)
            return end.end(), [ToolCall(name, arguments, text[start : end.end()])]

        return take_apart(text, self._opening, read, thinking=thinking)

    def _value(self, text: str, schema: Schema | None) -> Any:
        if self._padded:
            text = text.removeprefix("\n").removesuffix("\n")
        return value_of(text, schema or {})

    def _wrong(self, text: str, name: str, start: int, at: int) -> tuple[int, list[ToolCall]]:
        close = text.find(self._close, at)
        stop = len(text) if close < 0 else close + len(self._close)
        raw = text[start:stop]
        if close < 0:
            error = f"the call is not closed; end it with {self._close}"
        else:
            error = f"the call must be {self._form}"
        return stop, [ToolCall(name, raw=raw, error=error)]


@register_call_format("qwen3_coder")
class Qwen3CoderFormat(_XmlFormat):
    """`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`."""

    _opening = opening(r"<tool_call>|<function=")
    _head = re.compile(r"(?:<tool_call>\s*)?<function=(?P<name>[^>\n]+)>\s*")
    _key = re.compile(r"<parameter=(?P<key>[^>\n]+)>")
    _value_end = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")
    _end = re.compile(r"</function>(?:\s*</tool_call>)?")
    _close = "</function>"
    _form = "<function=NAME> with <parameter=KEY>VALUE</parameter> inside, then </function>"
    _padded = True

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        pairs = "".join(
            f"<parameter={key}>\n{_text(value)}\n</parameter>\n"
            for key, value in call.arguments.items()
        )
        return f"<tool_call>\n<function={call.name}>\n{pairs}</function>\n</tool_call>"


@register_call_format("glm")
class GlmFormat(_XmlFormat):
    """`<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>`."""

    ends = ("<|observation|>", "<|user|>")
    _opening = opening(r"<tool_call>")
    _head = re.compile(r"<tool_call>\s*(?P<name>[^<>\s]+)\s*")
    _key = re.compile(r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>")
    _value_end = re.compile(r"</arg_value>\s*(?=<arg_key>|</tool_call>)")
    _end = re.compile(r"</tool_call>")
    _close = "</tool_call>"
    _form = (
        "<tool_call>NAME with <arg_key>KEY</arg_key><arg_value>VALUE</arg_value> inside, then "
        "</tool_call>"
    )

    def write(self, call: ToolCall) -> str:
        """See CallFormat."""
        pairs = "".join(
            f"<arg_key>{key}</arg_key>\n<arg_value>{_text(value)}</arg_value>\n"
            for key, value in call.arguments.items()
        )
        return f"<tool_call>{call.name}\n{pairs}</tool_call>"


def _properties(tool: dict[str, Any]) -> dict[str, Schema]:
    properties = (tool["function"].get("parameters") or {}).get("properties") or {}
    return {key: value for key, value in properties.items() if isinstance(value, dict)}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def value_of(text: str, schema: Schema) -> Any:
    """What a text stands for under a parameter's schema."""
    for value in schema.get("enum") or ():
        if _text(value) == text.strip():
            return value
    types = _types(schema)
    if not types or "string" in types:
        return None if "null" in types and text.strip() in ("null", "None") else text
    stripped = text.strip()
    if stripped in _PYTHON:
        return _PYTHON[stripped]
    try:
        return json.loads(stripped)
    except (ValueError, RecursionError):
        return text  # the schema's check will say what it should have been


def _types(schema: Schema) -> set[str]:
    """The JSON types that a value may have; empty if the schema does not say."""
    given = schema.get("type")
    types = set(given) if isinstance(given, list) else {given} if given else set()
    for one in schema.get("anyOf") or schema.get("oneOf") or ():
        types |= _types(one)
    return types | {"null"} if types and schema.get("nullable") else types
