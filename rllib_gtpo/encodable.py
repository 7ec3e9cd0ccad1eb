"""Text that every encoder takes."""

from __future__ import annotations


def encodable(text: str) -> str:
    """`text` with escapes in place of lone surrogates, which UTF-8 does not have.

    JSON arguments of a call may hold them (`"\\ud800"`), and tools that make text out of bytes.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
