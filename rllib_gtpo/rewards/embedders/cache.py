"""One cache for every embedder that is slow or paid for.

A file for each vector, written beside its name and then renamed: several processes, machines and
runs may share a directory without locks, also on a network file system, where SQLite's write-ahead
log does not work.  The price is a small file for each text (4 KB with 1024 dimensions).
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rllib_gtpo.encodable import encodable
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.rewards.embedders.base import Embedder

_IN_MEMORY = 4096  # vectors
_CHECKSUM = 4  # bytes in front of the vector

_log = logging.getLogger(__name__)


class CachedEmbedder:
    """An embedder that asks another one only for texts it has not seen.  Failures are not kept.

    directory: Where vectors are kept; None keeps the last few thousand in memory only.
    """

    def __init__(self, embedder: Embedder, directory: str | None = None) -> None:
        if not isinstance(directory, str | None):
            raise ConfigError(f"embedder cache={directory!r}: give a directory, or leave it out.")
        self.embedder = embedder
        self._directory = Path(directory).expanduser() if directory else None
        if self._directory is not None and not self._directory.is_absolute():
            raise ConfigError(
                f"embedder cache={directory!r}: give an absolute path, since env runners work in "
                "directories of their own."
            )
        if self._directory is not None and self._directory.is_file():
            raise ConfigError(f"embedder cache={directory!r} is a file: give a directory.")
        self._memory: OrderedDict[str, np.ndarray] = OrderedDict()
        self._writable = True

    @property
    def identity(self) -> str:
        """See Embedder."""
        return self.embedder.identity

    def embed(self, texts: Sequence[str]) -> list[np.ndarray | Exception]:
        """See Embedder."""
        known: dict[str, np.ndarray | Exception] = {}
        for text in texts:
            if text not in known and (vector := self._find(text)) is not None:
                known[text] = vector
        missing = list(dict.fromkeys(text for text in texts if text not in known))
        embedded = self.embedder.embed(missing) if missing else []
        for text, result in zip(missing, embedded, strict=True):
            known[text] = result
            if not isinstance(result, Exception):
                self._remember(text, result)
                self._write(text, result)
        return [known[text] for text in texts]

    def _find(self, text: str) -> np.ndarray | None:
        vector = self._memory.get(text)
        if vector is None and self._directory is not None:
            vector = _read(self._file(self._directory, text))
        if vector is not None:
            self._remember(text, vector)
        return vector

    def _remember(self, text: str, vector: np.ndarray) -> None:
        self._memory[text] = vector
        self._memory.move_to_end(text)
        if len(self._memory) > _IN_MEMORY:
            self._memory.popitem(last=False)

    def _file(self, directory: Path, text: str) -> Path:
        name = _digest(text)
        return directory / _digest(self.identity)[:16] / name[:2] / f"{name}.f32"

    def _write(self, text: str, vector: np.ndarray) -> None:
        if self._directory is None or not self._writable:
            return
        data = vector.astype("<f4").tobytes()
        file = self._file(self._directory, text)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle, partial = tempfile.mkstemp(dir=file.parent, prefix=".")
            try:
                with os.fdopen(handle, "wb") as out:
                    out.write(zlib.crc32(data).to_bytes(_CHECKSUM, "little") + data)
                os.replace(partial, file)
            except OSError:
                os.unlink(partial)
                raise
        except OSError as error:
            self._writable = False
            _log.warning(
                "The embedder's cache %s cannot be written (%s); new texts of this run will be "
                "embedded again next time.",
                self._directory,
                error,
            )


def _read(file: Path) -> np.ndarray | None:
    """The vector in a file; None if there is none, or a damaged one, which is then written anew."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    data = stored[_CHECKSUM:]
    if (
        not data
        or len(data) % 4
        or zlib.crc32(data) != int.from_bytes(stored[:_CHECKSUM], "little")
    ):
        return None
    return np.frombuffer(data, dtype="<f4").astype(np.float32)


def _digest(text: str) -> str:
    return hashlib.sha256(encodable(text).encode()).hexdigest()
