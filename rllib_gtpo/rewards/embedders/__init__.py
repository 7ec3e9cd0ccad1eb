"""Texts to unit vectors whose dot product is the similarity of two texts.

| name | what | settings |
|---|---|---|
| "python_tokens" | counts of token n-grams of Python code; offline, the default | PythonTokens |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.rewards.embedders.base import Embedder
from rllib_gtpo.rewards.embedders.python_tokens import PythonTokens

__all__ = ["EMBEDDERS", "Embedder", "build_embedder"]

EMBEDDERS: dict[str, type[Any]] = {"python_tokens": PythonTokens}


def build_embedder(settings: str | Mapping[str, Any]) -> Embedder:
    """An embedder from its name, or from {"name": ..., its settings}.

    Checks every setting, and neither connects to anything nor loads anything: that waits for the
    first text.
    """
    given = {"name": settings} if isinstance(settings, str) else settings
    if not isinstance(given, Mapping) or "name" not in given:
        raise ConfigError(
            f"embedder={settings!r}: give a name (one of {', '.join(EMBEDDERS)}), or a dict such "
            "as {'name': 'python_tokens', 'ngrams': 3}."
        )
    name, options = given["name"], {k: v for k, v in given.items() if k != "name"}
    if name not in EMBEDDERS:
        raise ConfigError(f"embedder {name!r} is unknown{did_you_mean(name, EMBEDDERS)}")
    known = [field.name for field in fields(EMBEDDERS[name])]
    for key in options:
        if key not in known:
            raise ConfigError(f"embedder {name!r} has no setting {key!r}{did_you_mean(key, known)}")
    embedder: Embedder = EMBEDDERS[name](**options)
    return embedder
