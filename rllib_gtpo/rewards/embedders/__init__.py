"""Texts to unit vectors whose dot product is the similarity of two texts.

| name | what | settings |
|---|---|---|
| "python_tokens" | counts of token n-grams of Python code; offline, the default | PythonTokens |
| "titan" | Amazon Titan Text Embeddings V2 on Bedrock, as in the paper | Titan, `cache` |
| "huggingface" | a Hugging Face encoder or a sentence-transformers model | HuggingFace, `cache` |

`cache` is a directory for vectors, which runs and machines may share; without it the last few
thousand are kept in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.rewards.embedders.base import Embedder
from rllib_gtpo.rewards.embedders.cache import CachedEmbedder
from rllib_gtpo.rewards.embedders.huggingface import HuggingFace
from rllib_gtpo.rewards.embedders.python_tokens import PythonTokens
from rllib_gtpo.rewards.embedders.titan import Titan

__all__ = ["EMBEDDERS", "Embedder", "build_embedder"]

EMBEDDERS: dict[str, type[Any]] = {
    "python_tokens": PythonTokens,
    "titan": Titan,
    "huggingface": HuggingFace,
}
_CACHED = ("titan", "huggingface")  # the other one is as fast as a cache


def build_embedder(settings: str | Mapping[str, Any]) -> Embedder:
    """An embedder from its name, or from {"name": ..., its settings}.

    Checks every setting, and neither connects to anything nor loads anything: that waits for the
    first text.

    Raises:
        ConfigError: A name or setting is unknown, or a value impossible.
    """
    given = {"name": settings} if isinstance(settings, str) else settings
    if not isinstance(given, Mapping) or "name" not in given:
        raise ConfigError(
            f"embedder={settings!r}: give a name (one of {', '.join(EMBEDDERS)}), or a dict such "
            "as {'name': 'titan', 'region': 'us-east-1'}."
        )
    name, options = given["name"], {k: v for k, v in given.items() if k != "name"}
    if not isinstance(name, str) or name not in EMBEDDERS:
        raise ConfigError(f"embedder {name!r} is unknown{did_you_mean(name, EMBEDDERS)}")
    cached = name in _CACHED
    known = [field.name for field in fields(EMBEDDERS[name])] + ["cache"] * cached
    for key in options:
        if key not in known:
            raise ConfigError(f"embedder {name!r} has no setting {key!r}{did_you_mean(key, known)}")
    directory = options.pop("cache", None)
    embedder: Embedder = EMBEDDERS[name](**options)
    return CachedEmbedder(embedder, directory) if cached else embedder
