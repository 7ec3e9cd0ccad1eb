"""What the policy sees of a value: text of bounded length, made in bounded memory."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

from rllib_gtpo.encodable import encodable
from rllib_gtpo.sandbox.output import Output, clip, join_ends

_BATCH = 4096  # pieces of JSON that are joined at a time
_SMALL = (str, bytes, bytearray, int, float, type(None))


def is_quick(value: Any) -> bool:
    """Whether `to_text` with a limit takes no time, however long the text is."""
    return isinstance(value, _SMALL)


def to_text(value: Any, limit: int | None = None) -> str:
    """A string as it is, all else as JSON; what JSON cannot express appears as its `repr`.

    A text of more than `limit` characters loses its middle, see `clip`.
    """
    text = value if isinstance(value, str) else _write(value, limit)
    if limit is None or len(text) <= limit:
        text = encodable(text)
        return text if limit is None else clip(text, limit)
    return clip(text, limit).encode("utf-8", "replace").decode()  # as long as it was


def _write(value: Any, limit: int | None) -> str:
    if isinstance(value, (bytes, bytearray)) and limit is not None and len(value) > limit:
        output = Output(limit)
        output.feed(bytes(value))
        return output.take()
    try:
        return json.dumps(value, ensure_ascii=False) if limit is None else _json(value, limit)
    except (TypeError, ValueError, RecursionError):
        return repr(value)


def _json(value: Any, limit: int) -> str:
    """The value as JSON, of which only the ends are ever in memory."""
    pieces = json.JSONEncoder(ensure_ascii=False).iterencode(value)
    head = tail = ""
    total = 0
    while batch := "".join(islice(pieces, _BATCH)):
        total += len(batch)
        head += batch[: limit - len(head)]
        tail = (tail + batch[-limit:])[-limit:]
    return join_ends(head, tail, total, limit)
