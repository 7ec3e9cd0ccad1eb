"""A trajectory file whose rows are of whatever form people have: each is recognised by its keys.

    {"messages": [{"role", "content", "tool_calls", ...}]}      see rllib_gtpo.traces
    {"conversations": [{"from", "value"}]}                      ShareGPT, also as "messages"
    {"conversations": [{"role", "content"}]}
    {"prompt", "completion"}                                    each text, or a list of messages
    {"instruction", "input", "output"}                          Alpaca; `input` may be missing

"response" and "output" stand for "completion", too, and `tools` may be the text of a JSON list.
Whatever else a file holds is refused by row; nothing is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rllib_gtpo.chat import CallFormat
from rllib_gtpo.env import ToolEnv
from rllib_gtpo.errors import DataError
from rllib_gtpo.trace_formats.common import decoded
from rllib_gtpo.trace_formats.sharegpt import from_sharegpt
from rllib_gtpo.traces import Tools, UnusableRow, to_demonstration
from rllib_gtpo.types import Message

_COMPLETIONS = ("completion", "response", "output")
_KNOWN = "messages, conversations, prompt and completion, or instruction and output"


def read_demonstrations(
    path: Path, env: ToolEnv, call_format: CallFormat
) -> Iterator[tuple[str, list[Message], list[Message], Tools]]:
    """The demonstrations of a JSON-lines file, each with its place; errors name file and row."""
    if not path.is_file():
        raise DataError(f"cold_start.data={str(path)!r}: no such file (or write 'expert').")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            try:
                row = as_messages(json.loads(line))
                yield where, *to_demonstration(row, call_format, env)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            except ValueError as error:
                raise DataError(
                    f"{where}: not JSON: {error}. Each line is one object with {_KNOWN}; "
                    "`rllib convert` makes such lines of OpenHands traces."
                ) from error


def as_messages(row: Any) -> dict[str, Any]:
    """The same row with `messages`; UnusableRow if it is of no known form."""
    if not isinstance(row, dict):
        raise UnusableRow(f"is no object with {_KNOWN}.")
    row = dict(row)
    if isinstance(row.get("tools"), str):
        row["tools"] = decoded(row["tools"] or "[]", "tools")
    said = row.pop("conversations", None)
    said = row.get("messages", said)
    if isinstance(said, list) and any(isinstance(one, dict) and "from" in one for one in said):
        return _sharegpt({**row, "conversations": said})
    if said is not None:
        return {**row, "messages": said}
    prompt = row.get("prompt", row.get("instruction"))
    completion = next((row[key] for key in _COMPLETIONS if row.get(key) is not None), None)
    if prompt is None or completion is None:
        raise UnusableRow(f"{_why_unknown(row)}: expected {_KNOWN}.")
    if isinstance(prompt, str) and row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    return {**row, "messages": [*_said("user", prompt), *_said("assistant", completion)]}


def _said(role: str, content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    try:
        made = from_sharegpt(row)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UnusableRow(f"is not as ShareGPT writes it ({error!r}).") from error
    return {**({"task": row["task"]} if "task" in row else {}), **made}


def _why_unknown(row: dict[str, Any]) -> str:
    if "chosen" in row and "rejected" in row:
        return "compares two answers, of which a cold start needs one"
    if isinstance(row.get("text"), str):
        return "is one text, which does not say who wrote what"
    return f"has {', '.join(map(repr, list(row)[:8])) or 'no keys'}"
