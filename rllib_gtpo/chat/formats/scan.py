"""One pass over a turn's text: thinking, quotations, calls.

The rule of what is a call and what only speaks of one:
- Thinking (`<think>`, `[THINK]`) holds no calls, also where it is never closed.
- A call's own text is read to its end first, so that whatever its arguments contain is theirs.
- What stands in a closed Markdown fence, in backticks within a line, or in a line that begins with
  `>` is a quotation.  A fence that is never closed quotes nothing.
Quotation marks and the like are not decidable, so they quote nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rllib_gtpo.chat.formats.base import OPENINGS, THINKING, ParsedTurn
from rllib_gtpo.types import ToolCall

Read = Callable[[str, "re.Match[str]"], tuple[int, "list[ToolCall] | None"]]
"""Reads what an opening mark opens: where that ends, and its calls; None if it is mere text."""

_CLOSED_BY = dict(THINKING)
_THINK = "|".join(map(re.escape, OPENINGS))
_QUOTE = r"^[ \t]*(?P<fence>```+)[^\n`]*\n|(?P<quote>^[ \t]*>[^\n]*|`[^`\n]+`)"
_FENCE_END = re.compile(r"^[ \t]*```+[ \t]*$", re.MULTILINE)


def opening(mark: str, *, quotes: bool = True) -> re.Pattern[str]:
    """The pattern that `take_apart` looks for: `mark` opens a call."""
    parts = [f"(?P<think>{_THINK})", f"(?P<call>{mark})", *([_QUOTE] if quotes else [])]
    return re.compile("|".join(parts), re.MULTILINE)


def take_apart(
    text: str, pattern: re.Pattern[str], read: Read, *, thinking: bool = False
) -> ParsedTurn:
    """A turn's content, thinking and calls; in time proportional to the text."""
    content: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    start = position = 0  # of what is not yet in `content`, and of the search
    fences_end = True
    if thinking:
        thought, start = _thought(text, 0, [closing for _, closing in THINKING])
        thoughts.append(thought)
        position = start
    while match := pattern.search(text, position):
        kind = match.lastgroup
        position = match.end()
        if kind == "fence":
            end = _FENCE_END.search(text, position) if fences_end else None
            fences_end = end is not None
            position = position if end is None else end.end()
        elif kind == "think":
            content.append(text[start : match.start()])
            thought, start = _thought(text, position, [_CLOSED_BY[match.group()]])
            thoughts.append(thought)
            position = start
        elif kind == "call":
            position, found = read(text, match)
            if found is not None:
                content.append(text[start : match.start()])
                calls += found
                start = position
    content.append(text[start:])
    return ParsedTurn("".join(content).strip(), "".join(thoughts), calls)


def _thought(text: str, start: int, closings: list[str]) -> tuple[str, int]:
    """A thinking block's text, and where the block ends."""
    found = [(at, mark) for mark in closings if (at := text.find(mark, start)) >= 0]
    if not found:
        return text[start:], len(text)
    at, mark = min(found)
    return text[start:at], at + len(mark)
