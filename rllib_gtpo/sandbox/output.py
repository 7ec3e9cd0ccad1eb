"""Keeping the head and the tail of a text of any length."""

from __future__ import annotations


def _marker(count: int, unit: str) -> str:
    return f"\n... [{count} {unit} omitted] ...\n"


def clip(text: str, limit: int) -> str:
    """Shorten `text` to at most `limit` characters, keeping its head and tail around a marker."""
    return join_ends(text, text, len(text), limit)


def join_ends(head: str, tail: str, total: int, limit: int) -> str:
    """`clip` of a text of `total` characters that begins with `head` and ends with `tail`.

    Both have at least `limit` characters, or are the whole text.
    """
    if total <= limit:
        return head
    room = limit - len(_marker(total, "characters"))
    if room <= 0:
        return head[:limit]
    first, last = room - room // 2, room // 2
    return head[:first] + _marker(total - first - last, "characters") + tail[len(tail) - last :]


class Output:
    """Collects the bytes of a stream in bounded memory and gives them as one valid string."""

    def __init__(self, limit: int) -> None:
        """Keep enough bytes for `limit` characters at either end."""
        self.limit = limit
        self.total = 0  # bytes seen, kept or not
        self._keep = 4 * limit  # the longest UTF-8 character has four bytes
        self._head = bytearray()
        self._tail = bytearray()

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self.total += len(data)
        room = self._keep - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        if data:
            self._tail += data[-self._keep :]
            if len(self._tail) > 2 * self._keep:
                del self._tail[: -self._keep]

    def take(self, before: str = "", after: str = "") -> str:
        """The text so far between two notes, at most `limit` characters in all; starts anew."""
        room = self.limit - len(before) - len(after)
        text = self._text(room)
        if after and text and not text.endswith("\n"):
            text = self._text(room - 1) + "\n"
        self.total = 0
        self._head.clear()
        self._tail.clear()
        return before + text + after

    def _text(self, room: int) -> str:
        if self.total <= 2 * self._keep:  # not what was dropped: that depends on the pieces' sizes
            return clip((self._head + self._tail).decode("utf-8", "backslashreplace"), room)
        # Something is missing between head and tail, so that neither can be short of `room`
        # characters; a character cut at the seam lies in the part that is thrown away.
        head = self._head.decode("utf-8", "backslashreplace")
        tail = self._tail[-self._keep :].decode("utf-8", "backslashreplace")
        side = (room - len(_marker(self.total, "bytes"))) // 2
        kept = [head[:side], tail[len(tail) - side :]]
        size = sum(len(part.encode("utf-8", "backslashreplace")) for part in kept)
        return kept[0] + _marker(max(self.total - size, 0), "bytes") + kept[1]
