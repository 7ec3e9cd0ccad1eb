"""What a template does differently in a whole conversation from what a rollout builds of pieces.

A rollout's text is the prompt, what was sampled, and deltas; nothing in it is rendered again.  Many
templates render earlier turns in another way: they leave out thinking, or trim.  Each such way has
a name here and a rule under which the two texts are equal.  A template that differs in any other
way is refused.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rllib_gtpo.chat.template import PROBE, ChatTemplate, assistant, call_id, tool, user
from rllib_gtpo.errors import ChatTemplateError
from rllib_gtpo.types import Message


class Deviation(StrEnum):
    """In what a whole rendering differs; rollouts keep what was sampled in each case."""

    THINKING = "thinking"  # leaves out, adds or rewrites the thinking of earlier turns
    ENDS = "ends"  # closes earlier turns with another token than a turn is ended with
    HEADER = "header"  # heads a turn behind results, where its own generation prompt does not
    WHITESPACE = "whitespace"  # trims or changes the space around texts
    MARKERS = "markers"  # writes other special tokens in later rounds than in the first
    ORDER = "order"  # puts the text beside a turn's calls behind their results: not compared


_THOUGHTS = re.compile(
    r"(?:<think>(?:(?!<think>).)*?</think>"
    r"|<\|channel\|>analysis<\|message\|>(?:(?!<\|end\|>).)*<\|end\|><\|start\|>assistant"
    r"|<\|channel>thought\n(?:(?!<channel\|>).)*<channel\|>)\n*",
    re.DOTALL,
)
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks something up.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "what"}},
            "required": ["query"],
        },
    },
}


@dataclass
class Spoken:
    """An assistant's turn: as a message for the template, or as the very text that is sampled."""

    message: Message
    verbatim: bool = False
    results: list[Message] = field(default_factory=list)  # what follows it


@dataclass
class Conversation:
    """A prompt, turns, and what comes between them."""

    prompt: list[Message]
    turns: list[Spoken]
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All of it, as a template takes it."""
        return [*self.prompt, *(m for turn in self.turns for m in (turn.message, *turn.results))]


def spoken(
    text: str,
    *,
    thinking: str = "",
    calls: Sequence[tuple[str, dict[str, Any]]] = (),
    results: Sequence[Message] = (),
    verbatim: bool = False,
) -> Spoken:
    """A turn with text, thinking and calls in the fields that templates know."""
    message = assistant(text)
    if thinking:
        message |= {"reasoning_content": thinking, "thinking": thinking}
    if calls:
        message["tool_calls"] = [
            {"id": call_id(i), "type": "function", "function": {"name": n, "arguments": a}}
            for i, (n, a) in enumerate(calls)
        ]
    return Spoken(message, verbatim, list(results))


def in_pieces(template: ChatTemplate, conversation: Conversation) -> str | None:
    """The text that a rollout builds; None if the template cannot say what would be sampled."""
    text = template.render(conversation.prompt, conversation.tools, generate=True)
    for turn in conversation.turns:
        sampled = turn.message["content"] if turn.verbatim else template.canonical(turn.message)
        if sampled is None:
            return None
        if turn.verbatim and text.rstrip().endswith("<think>"):
            thought = sampled.startswith("<think>\n")
            sampled = sampled[len("<think>\n") :] if thought else f"\n</think>\n\n{sampled}"
        delta = template.delta(turn.results)
        end = template.closing_end(turn.message) or delta.end
        text += sampled + end + delta.rest
    return text


def equal(one: str, other: str, template: ChatTemplate, allowed: Sequence[Deviation]) -> bool:
    """Whether two renderings are the same but for the deviations."""
    for deviation, normal in _NORMAL.items():
        if deviation in allowed:
            one, other = normal(one, other, template)
    return one == other


@dataclass(frozen=True)
class Difference:
    """Where a deviation was seen first: in the whole rendering, and in the pieces."""

    whole: str
    pieces: str


def find_deviations(template: ChatTemplate) -> dict[Deviation, Difference]:
    """The deviations of a template; ChatTemplateError if it has any that is not among them."""
    found: dict[Deviation, Difference] = {}
    moved = moved_text(template)
    if moved is not None:
        found[Deviation.ORDER] = moved
    compared = 0
    refused = ""
    for conversation in conversations(template):
        try:
            whole = template.render(conversation.messages, conversation.tools, generate=True)
            pieces = in_pieces(template, conversation)
        except ChatTemplateError as error:  # a rollout with such messages will say so
            refused = str(error)
            continue
        if pieces is None:
            continue
        compared += 1
        if not equal(whole, pieces, template, list(found)):
            difference = _difference(whole, pieces)
            for deviation in _explanation(whole, pieces, template, difference):
                found.setdefault(deviation, difference)
    if not compared:
        raise ChatTemplateError(f"No conversation with tools could be checked: {refused}")
    return {d: found[d] for d in Deviation if d in found}


def _explanation(
    whole: str, pieces: str, template: ChatTemplate, difference: Difference
) -> tuple[Deviation, ...]:
    """The fewest deviations under which the texts are equal."""
    for size in range(1, len(_NORMAL) + 1):
        for allowed in itertools.combinations(_NORMAL, size):
            if equal(whole, pieces, template, allowed):
                return allowed
    raise ChatTemplateError(
        "The chat template cannot be continued exactly: rendered as a whole it has "
        f"{difference.whole!r} where turn by turn it has {difference.pieces!r}. "
        "Set chat_template= to one that leaves earlier messages alone."
    )


def _difference(whole: str, pieces: str) -> Difference:
    pairs = zip(whole, pieces, strict=False)
    shorter = min(len(whole), len(pieces))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    return Difference(whole[at : at + 40], pieces[at : at + 40])


def moved_text(template: ChatTemplate) -> Difference | None:
    """Where the text beside a turn's calls goes, if not in front of their results."""
    if not template.writes_calls:
        return None
    turn = spoken("beside", calls=[("lookup", {"query": "x"})], results=[tool("found", "lookup")])
    conversation = Conversation([user("question")], [turn])
    try:
        whole = template.render(conversation.messages, generate=True)
    except ChatTemplateError:
        return None
    pieces = in_pieces(template, conversation)
    if pieces is None or not 0 <= whole.find("found") < whole.find("beside"):
        return None
    return _difference(whole, pieces)


def writes_text_verbatim(template: ChatTemplate) -> bool:
    """Whether an assistant's content is what the policy samples, and nothing stands around it."""
    text = template.canonical(assistant(PROBE))
    return text is None or _THOUGHTS.sub("", text) == PROBE or _bare(text) == PROBE


def _bare(text: str) -> str:
    """Without the end of a thinking block that the prompt has opened."""
    return text.rpartition("</think>")[2].strip()


def conversations(template: ChatTemplate) -> Iterator[Conversation]:
    """Probing conversations, in all forms that the template knows."""
    words = map("w{}x".format, itertools.count())
    kinds: list[Callable[[], Spoken]] = [
        lambda: spoken(next(words)),
        lambda: spoken(next(words), thinking=next(words)),
    ]
    if writes_text_verbatim(template):
        kinds += [
            lambda: spoken(next(words), verbatim=True),
            lambda: spoken(f"  {next(words)}\n {next(words)} \n", verbatim=True),
            lambda: spoken(f"<think>\n{next(words)}\n</think>\n\n{next(words)}", verbatim=True),
        ]
    if template.writes_calls:
        kinds += [
            lambda: spoken("", calls=[("lookup", {"query": next(words)})]),
            lambda: spoken("", thinking=next(words), calls=[("lookup", {"query": next(words)})]),
            lambda: spoken("", calls=[("lookup", {"query": next(words)})] * 2),
        ]
        if moved_text(template) is None:
            kinds.append(lambda: spoken(next(words), calls=[("lookup", {"query": next(words)})]))
    openings: list[tuple[list[Message], list[dict[str, Any]]]] = [
        ([user("question")], []),
        ([{"role": "system", "content": "rules"}, user("question")], [PROBE_TOOL]),
        ([user("question"), assistant("answer"), user("again")], [PROBE_TOOL]),
    ]
    for (prompt, tools), kind in itertools.product(openings, kinds):
        for rounds in (1, 3):
            turns = [kind() for _ in range(rounds)]
            for turn in turns:
                turn.results = _answers(turn, template, words)
            yield Conversation(prompt, turns, tools)
    for kind, other in itertools.product(kinds, kinds):
        turns = [kind(), other(), other()]
        if "tool_calls" not in turns[0].message:
            turns[0].results = [user(next(words))]
        for turn in turns:
            turn.results = turn.results or _answers(turn, template, words)
        yield Conversation([user("question")], turns)


def _answers(turn: Spoken, template: ChatTemplate, words: Iterator[str]) -> list[Message]:
    """What may follow a turn: results, or where these need a call and it has none, a question."""
    calls = turn.message.get("tool_calls")
    if template.shape.needs_calls and not calls:
        return [user(next(words))]
    return [tool(next(words), "lookup") for _ in calls or [0]]


Pair = tuple[str, str]


def _without_thinking(one: str, other: str, template: ChatTemplate) -> Pair:
    return _THOUGHTS.sub("", one), _THOUGHTS.sub("", other)


def _one_end(one: str, other: str, template: ChatTemplate) -> Pair:
    ends = {*template.ends, template.delta([user(PROBE + "?")]).end}
    pattern = re.compile("|".join(map(re.escape, ends)))
    first = template.ends[0]
    return pattern.sub(lambda _: first, one), pattern.sub(lambda _: first, other)


def _without_space(one: str, other: str, template: ChatTemplate) -> Pair:
    return re.sub(r"\s+", "", one), re.sub(r"\s+", "", other)


def _without_header(one: str, other: str, template: ChatTemplate) -> Pair:
    header = template.header
    return (one.replace(header, ""), other.replace(header, "")) if header else (one, other)


def _common_markers(one: str, other: str, template: ChatTemplate) -> Pair:
    """Without the special tokens that one has more often than the other."""
    counts = [Counter(template.special.findall(text)) for text in (one, other)]
    differ = {m for m in counts[0] | counts[1] if counts[0][m] != counts[1][m]}
    if not differ:
        return one, other
    pattern = re.compile("|".join(map(re.escape, differ)))
    return pattern.sub("", one), pattern.sub("", other)


_NORMAL: dict[Deviation, Callable[[str, str, ChatTemplate], Pair]] = {
    Deviation.THINKING: _without_thinking,
    Deviation.ENDS: _one_end,
    Deviation.HEADER: _without_header,
    Deviation.WHITESPACE: _without_space,
    Deviation.MARKERS: _common_markers,
}
