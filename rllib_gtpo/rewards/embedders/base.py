"""What an embedder is, and what embedders share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from rllib_gtpo.errors import ConfigError, EmbedderError


class Embedder(Protocol):
    """Turns texts into unit vectors."""

    @property
    def identity(self) -> str:
        """Changes whenever the vectors would: vectors of different identities do not compare."""
        ...

    def embed(self, texts: Sequence[str]) -> list[np.ndarray | Exception]:
        """One float32 unit vector for each text, or the reason why that text has none.

        Texts are not empty.  What is wrong with one text never costs the others theirs.
        """
        ...


def unit_vector(values: Any, dimensions: int) -> np.ndarray:
    """`values` scaled to length 1; EmbedderError if that cannot be."""
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise EmbedderError(f"the embedding is not a list of numbers: {error}") from error
    if vector.shape != (dimensions,):
        raise EmbedderError(
            f"the embedding has shape {vector.shape} in place of {dimensions} numbers."
        )
    length = float(np.linalg.norm(vector))
    if not np.isfinite(length) or length == 0.0:
        raise EmbedderError(f"the embedding's length is {length}, which cannot be scaled to 1.")
    return (vector / length).astype(np.float32)


def check_positive(embedder: str, **settings: Any) -> None:
    """Refuses settings that are not whole numbers of at least 1."""
    for name, value in settings.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(
                f"embedder {embedder!r}: {name}={value!r} must be a whole number of at least 1."
            )
