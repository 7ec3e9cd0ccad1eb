"""A chat template taken apart: what it puts behind an assistant's turn, and what ends one.

The template is asked, never read: a conversation with a known assistant text is rendered, and what
follows that text is what the template adds.  How messages must be given to it is found by trying.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from rllib_gtpo.errors import ChatTemplateError
from rllib_gtpo.types import Message

PROBE = "zxqv probe zxqv"  # a text that no template changes and no other part contains
_MARKER = re.compile(r"\s*(<[^<>\s]+>|\[[^\[\]\s]+\]|\S{1,20})")


class Results(StrEnum):
    """How a template takes the results of tool calls."""

    TOOL = "tool messages"
    CALLS = "tool messages behind structured calls"
    USER = "user messages"


@dataclass(frozen=True)
class Shape:
    """How messages are given to a template."""

    results: Results = Results.TOOL
    parts: bool = False  # contents as lists of parts, [{"type": "text", "text": ...}]

    @property
    def needs_calls(self) -> bool:
        """Whether results are only taken behind structured calls."""
        return self.results is Results.CALLS

    def adapt(self, messages: Sequence[Message]) -> list[Message]:
        """The messages in this shape."""
        adapted: list[Message] = []
        for is_tool, run in itertools.groupby(messages, key=lambda m: m["role"] == "tool"):
            group = list(run)
            if is_tool and self.results is Results.USER:
                adapted.append(user("\n".join(str(m["content"]) for m in group)))
            elif is_tool and self.needs_calls:
                calls = adapted[-1].get("tool_calls") or () if adapted else ()
                known = [call.get("id") for call in calls]
                ids = known if len(known) == len(group) else [None] * len(group)
                for index, (one, known_id) in enumerate(zip(group, ids, strict=True)):
                    adapted.append({"tool_call_id": known_id or call_id(index), **one})
            else:
                adapted += group
        if self.results is Results.USER:
            adapted = _merged_users(adapted)
        if self.parts:
            adapted = [
                {**m, "content": [{"type": "text", "text": m["content"]}]}
                if isinstance(m.get("content"), str)
                else m
                for m in adapted
            ]
        return adapted


@dataclass(frozen=True)
class Delta:
    """What a template puts behind an assistant's text up to the next generation."""

    end: str  # the special token that ends the turn
    rest: str


class ChatTemplate:
    """A tokenizer's template.  Raises ChatTemplateError when made if turns cannot be told apart."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        ids = set(tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}
        names = sorted(map(str, tokenizer.convert_ids_to_tokens(sorted(ids))), key=len)
        self.special = re.compile("|".join(map(re.escape, reversed(names))) or r"(?!)")
        self.shape = self._find_shape()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] = (),
        *,
        generate: bool,
        shape: Shape | None = None,
    ) -> str:
        """The template's text of a conversation."""
        try:
            text: str = self.tokenizer.apply_chat_template(
                (shape or self.shape).adapt(messages),
                tools=list(tools) or None,
                add_generation_prompt=generate,
                tokenize=False,
            )
        except Exception as error:  # templates raise what they like
            reason = str(error) or type(error).__name__
            raise ChatTemplateError(f"the chat template refuses the messages: {reason}") from error
        return text

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The special tokens that end a turn: with the last message, or what may follow it."""
        found = [self.closing_end(assistant(PROBE)), self.delta([tool(PROBE)]).end]
        if found[0] is None:
            found[0] = self.delta([user("probe")]).end
        if self.writes_calls:
            found.append(self.closing_end(_with_calls([call(0, "probe")])))
        return tuple(dict.fromkeys(end for end in found if end is not None))

    @cached_property
    def header(self) -> str:
        """What the template puts in front of an assistant's turn, behind a user's message."""
        opened, closed = self._prompt, self.render([user("probe")], generate=False)
        pairs = enumerate(zip(opened, closed, strict=False))
        return opened[next((i for i, (a, b) in pairs if a != b), len(closed)) :]

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the template explains tools; else the task's own messages must."""
        schema = {
            "type": "function",
            "function": {
                "name": "lookup",
                "description": "",
                "parameters": {"type": "object", "properties": {}},
            },
        }
        try:
            return "lookup" in self.render([user("probe")], [schema], generate=True)
        except ChatTemplateError:
            return False

    @cached_property
    def writes_calls(self) -> bool:
        """Whether the template writes structured calls; else they are part of the content."""
        try:
            text = self.render([user("?"), _with_calls([call(0, "lookup")])], generate=False)
        except ChatTemplateError:
            return False
        return PROBE in text and "lookup" in text

    def delta(self, messages: Sequence[Message], *, shape: Shape | None = None) -> Delta:
        """What comes behind an assistant's text when `messages` follow."""
        shape = shape or self.shape
        turn = assistant(PROBE)
        if shape.needs_calls and messages and messages[0]["role"] == "tool":
            results = list(itertools.takewhile(lambda m: m["role"] == "tool", messages))
            turn = _with_calls(
                [call(i, m.get("name") or "unknown", m) for i, m in enumerate(results)]
            )
        whole = self.render([user("probe"), turn, *messages], generate=True, shape=shape)
        _, *behind = whole.split(PROBE, len(turn.get("tool_calls", "?")))
        if not behind:
            alone = self.render([user("probe"), turn], generate=False, shape=shape)
            raise ChatTemplateError(
                "the chat template changes an assistant's message when others follow"
                if PROBE in alone
                else "the chat template does not write an assistant's message verbatim"
            )
        after = behind[-1]
        if "tool_calls" in turn:
            end = self._end_of_calls(turn, after, shape)
        else:
            match = self.special.match(after)
            if match is None:
                raise ChatTemplateError(_no_end(after, self.tokenizer))
            end = match
        return Delta(end.group(), after[end.end() :])

    def canonical(self, message: Message) -> str | None:
        """What the policy samples when it writes a turn as the template does, without its end.

        None where the template does not write it behind its own generation prompt.
        """
        whole = self.render([user("probe"), message], generate=False)
        if not whole.startswith(self._prompt):
            return None
        closing = self._closings["tool_calls" in message]
        return whole[len(self._prompt) :].removesuffix(closing)

    def closing_end(self, message: Message) -> str | None:
        """The special token that ends a turn which is the last one; None if there is none."""
        match = self.special.match(self._closings["tool_calls" in message])
        return match.group() if match else None

    @cached_property
    def _prompt(self) -> str:
        return self.render([user("probe")], generate=True)

    @cached_property
    def _closings(self) -> tuple[str, str]:
        """What closes a conversation that ends with an assistant's turn, without and with calls.

        That is the end token and what follows.  Behind calls it is the last special token: others
        may belong to the calls.
        """
        plain = self._closing(assistant(PROBE), 0)
        if not self.writes_calls:
            return plain, plain
        return plain, self._closing(_with_calls([call(0, "probe")]), -1)

    def _closing(self, turn: Message, which: int) -> str:
        after = self.render([user("probe"), turn], generate=False).rpartition(PROBE)[2]
        ends = list(self.special.finditer(after))
        return after[ends[which].start() :] if ends else ""

    def _end_of_calls(self, turn: Message, after: str, shape: Shape) -> re.Match[str]:
        """Where a turn with structured calls ends in what follows its last argument."""
        text = self.render([user("probe"), turn], generate=False, shape=shape)
        closed = text.rpartition(PROBE)[2]
        ends = list(self.special.finditer(closed))
        if ends:
            if not after.startswith(closed[: ends[-1].end()]):
                raise ChatTemplateError(
                    "the chat template changes an assistant's calls when results follow"
                )
            return next(m for m in self.special.finditer(after) if m.start() == ends[-1].start())
        match = self.special.search(after)
        if match is None:
            raise ChatTemplateError(_no_end(after, self.tokenizer))
        return match

    def _find_shape(self) -> Shape:
        """The first shape in which results arrive and the next turn is continued."""
        reasons: dict[str, str] = {}  # with the shape that each was met in first
        for results in Results:
            for parts in (False, True):
                shape = Shape(results, parts)
                try:
                    self._try(shape)
                except ChatTemplateError as error:
                    given = f"{results.value}{', in parts' if parts else ''}"
                    reasons.setdefault(str(error), given)
                else:
                    return shape
        listed = "; ".join(f"with {given}: {reason}" for reason, given in reasons.items())
        raise ChatTemplateError(
            f"The chat template cannot be continued turn by turn ({listed}). Set chat_template= to "
            "one that can."
        )

    def _try(self, shape: Shape) -> None:
        contents = ["qxone", "qxtwo"]
        for number in (1, 2):
            answers = [tool(content) for content in contents[:number]]
            rest = self.delta(answers, shape=shape).rest
            if re.findall("qx(?:one|two)", rest) != contents[:number]:
                raise ChatTemplateError("the chat template leaves out what tools answer")
        turns: list[Message] = [user("probe")]
        for _ in range(2):
            said = _with_calls([call(0, "probe")]) if shape.needs_calls else None
            turns += [said or assistant(PROBE), tool(contents[0])]
        self.render(turns, generate=True, shape=shape)


def user(content: str) -> Message:
    """A user's message."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant's message."""
    return {"role": "assistant", "content": content}


def tool(content: str, name: str = "probe") -> Message:
    """A tool's message."""
    return {"role": "tool", "name": name, "content": content}


def call(index: int, name: str, answer: Message | None = None) -> dict[str, Any]:
    """A structured call, with the id that its answer refers to."""
    known = (answer or {}).get("tool_call_id") or call_id(index)
    return {
        "id": known,
        "type": "function",
        "function": {"name": name, "arguments": {"query": PROBE}},
    }


def call_id(index: int) -> str:
    """An id for a call that has none: nine letters and digits, as Mistral's templates want it."""
    return f"call{index:05d}"


def _with_calls(calls: list[dict[str, Any]]) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _merged_users(messages: list[Message]) -> list[Message]:
    """One message where several of a user follow each other: such templates want alternation."""
    merged: list[Message] = []
    for message in messages:
        if merged and message["role"] == merged[-1]["role"] == "user":
            merged[-1] = user(f"{merged[-1]['content']}\n{message['content']}")
        else:
            merged.append(message)
    return merged


def _no_end(after: str, tokenizer: Any) -> str:
    marker = _MARKER.match(after)
    if marker is None:
        return "the chat template puts nothing behind an assistant's message that could end it"
    text = marker.group(1)
    count = len(tokenizer.encode(text, add_special_tokens=False))
    if text in map(str, tokenizer.all_special_tokens):
        return (
            f"the chat template closes an assistant's message with {after[:40]!r}, which does not "
            "start with a special token, so that a turn's end cannot be sampled as one"
        )
    return (
        f"the chat template closes an assistant's message with {after[:40]!r}, but {text!r} is "
        f"{count} ordinary token{'s' if count != 1 else ''} of this tokenizer and not one special "
        "token, so a turn's end cannot be sampled: use the tokenizer that belongs to the template, "
        f"or add {text!r} to it as a special token"
    )
