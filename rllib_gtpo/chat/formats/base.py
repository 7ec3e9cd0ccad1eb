"""What a tool-call format is, and the registry of formats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.types import ToolCall

if TYPE_CHECKING:
    from rllib_gtpo.chat.template import ChatTemplate

THINKING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))
OPENINGS = tuple(opening for opening, _ in THINKING)

F = TypeVar("F", bound="type[CallFormat]")


@dataclass(slots=True)
class ParsedTurn:
    """A turn's text taken apart."""

    content: str
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)


class CallFormat(ABC):
    """How the policy writes tool calls.

    Attributes:
        explained: Whether chat templates explain tools in it; where not, the task's own messages
            must.
        fixed: Whether it is the same for every tokenizer.
        ends: Special tokens that end a turn besides the template's, where the tokenizer has them.
    """

    name: str = ""
    explained: ClassVar[bool] = True
    fixed: ClassVar[bool] = True
    ends: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def parse(
        self, text: str, tools: Sequence[dict[str, Any]], *, thinking: bool = False
    ) -> ParsedTurn:
        """Finds the calls; a call that cannot be read is returned with its `error` set.

        `thinking`: the prompt has opened a thinking block, in which the text begins.
        """

    @abstractmethod
    def write(self, call: ToolCall) -> str:
        """The call as the policy should write it; what the format cannot say parses to another."""

    def parse_sampled(
        self, text: str, tools: Sequence[dict[str, Any]], *, prompt: str, end: str
    ) -> ParsedTurn:
        """`parse`, knowing the end of the prompt and the stop token that was sampled, if any."""
        return self.parse(text, tools, thinking=prompt.rstrip().endswith(OPENINGS))

    def bind(self, template: ChatTemplate) -> CallFormat:
        """The format as it is for a template and its tokenizer."""
        return self

    def write_all(self, calls: Sequence[ToolCall]) -> str:
        """The calls of one turn."""
        return "\n".join(map(self.write, calls))


_FORMATS: dict[str, CallFormat] = {}


def register_call_format(name: str) -> Callable[[F], F]:
    """Makes a subclass of CallFormat known as `call_format="name"`."""

    def register(cls: F) -> F:
        known = _FORMATS.get(name)
        if known is not None and type(known).__qualname__ != cls.__qualname__:
            raise ConfigError(f"call_format {name!r} is taken by {type(known).__qualname__}.")
        instance = cls()
        instance.name = name
        _FORMATS[name] = instance
        return cls

    return register


def call_format(name: str) -> CallFormat:
    """The call format of that name."""
    if name not in _FORMATS:
        raise ConfigError(f"call_format={name!r} is unknown{did_you_mean(name, _FORMATS)}.")
    return _FORMATS[name]


def call_formats() -> dict[str, CallFormat]:
    """All that are registered, by name."""
    return dict(_FORMATS)


def call_of(data: Any, raw: str, key: str = "arguments") -> ToolCall:
    """The call that a JSON object describes, with its arguments under `key`."""
    if not isinstance(data, dict) or not isinstance(data.get("name"), str):
        error = f'the call must be {{"name": ..., "{key}": {{...}}}}'
        return ToolCall("", raw=raw, error=error)
    arguments = data.get(key, {})
    if not isinstance(arguments, dict):
        return ToolCall(data["name"], raw=raw, error=f'"{key}" must be an object')
    known = data.get("id")
    return ToolCall(data["name"], arguments, raw, id=known if isinstance(known, str) else None)
