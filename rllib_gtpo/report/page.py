"""One HTML file that needs nothing else.

Whatever came from a model or a task is in it only as base64 of compressed JSON, which the page's
own script turns into text nodes: it can neither end an element nor be one.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import os
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from rllib_gtpo.report.groups import encode

_CHUNK = 1_500_000  # bytes of JSON


class Page:
    """Writes a report piece by piece; the file appears when it is complete.

    A context manager: `add` groups, then `finish`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self._file: BinaryIO
        self._open: list[bytes] = []
        self._size = self._chunks = 0

    def __enter__(self) -> Page:
        self._file = self._partial.open("wb")
        self._style, self._script = asset("report.css"), asset("report.js")
        policy = (
            f"default-src 'none'; img-src data:; style-src '{source_hash(self._style)}'; "
            f"script-src '{source_hash(self._script)}'; base-uri 'none'; form-action 'none'"
        )
        head = asset("head.html").replace(b"{policy}", policy.encode())
        self._file.write(head.replace(b"{style}", self._style))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()  # writes the last of it, for which there may be no room
            if kind is None:
                os.replace(self._partial, self._path)
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, group: dict[str, Any]) -> tuple[int, int]:
        """Puts a group into the page; returns its chunk and its place there."""
        text = encode(group)
        if self._open and self._size + len(text) > _CHUNK:
            self._flush()
        self._open.append(text)
        self._size += len(text)
        return self._chunks, len(self._open) - 1

    def finish(self, overview: dict[str, Any]) -> None:
        """Puts in what is read first, and the script."""
        self._flush()
        self._write_data("overview", encode(overview))
        self._file.write(b"<script>" + self._script + b"</script>\n</body>\n</html>\n")

    def _flush(self) -> None:
        if self._open:
            self._write_data(f"chunk-{self._chunks}", b"[" + b",".join(self._open) + b"]")
            self._chunks += 1
            self._open, self._size = [], 0

    def _write_data(self, name: str, text: bytes) -> None:
        packed = base64.b64encode(gzip.compress(text, 6, mtime=0))
        self._file.write(b'<script type="application/gzip+json" id="%s">' % name.encode())
        self._file.write(packed + b"</script>\n")


def asset(name: str) -> bytes:
    """A file of the page's own."""
    return (files("rllib_gtpo.report") / "assets" / name).read_bytes().strip()


def source_hash(text: bytes) -> str:
    """As a content security policy names a style or a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text).digest()).decode()
