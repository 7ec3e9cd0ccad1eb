"""When a run ends: thresholds on the flattened result of an iteration."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from typing import Any

from rllib_gtpo.errors import ConfigError


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings to one level: {"a": {"b": 1}} -> {"a/b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{path}/"))
        else:
            flat[path] = value
    return flat


def numbers(result: Mapping[str, Any]) -> dict[str, float]:
    """The scalar metrics of a result, flat, without its config."""
    flat = flatten({k: v for k, v in result.items() if k != "config"})
    scalars: dict[str, float] = {}
    for key, value in flat.items():
        if (
            isinstance(value, bool | str | bytes)
            or value is None
            or not hasattr(value, "__float__")
        ):
            continue
        try:
            scalars[key] = float(value)
        except (TypeError, ValueError):  # an array
            continue
    return scalars


def near(name: str, names: Any, count: int = 3) -> list[str]:
    """The names that `name` may have meant, best first."""
    names = sorted(set(names))
    tails = [n for n in names if n.endswith("/" + name) or n.split("/")[-1] == name.split("/")[-1]]
    close = difflib.get_close_matches(name, names, n=count, cutoff=0.55)
    return list(dict.fromkeys([*tails, *close]))[:count]


def hint(name: str, names: Any) -> str:
    """ "; did you mean 'x'?" or nothing."""
    found = near(name, names)
    return f"; did you mean {' or '.join(repr(n) for n in found)}?" if found else ""


class StopCriteria:
    """Thresholds; the run ends as soon as one metric is at or above its own."""

    def __init__(
        self, thresholds: Mapping[str, Any], evaluation_interval: int | None = None
    ) -> None:
        """`thresholds` may be nested; a key may be written "a/b" or "a.b"."""
        self.thresholds: dict[str, float] = {}
        for key, value in flatten(thresholds).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise ConfigError(f"stop: the threshold of {key!r} must be a number, not {value!r}")
            self.thresholds[key] = float(value)
        self._evaluation_interval = evaluation_interval or 0
        self._iterations = 0

    def __bool__(self) -> bool:
        return bool(self.thresholds)

    def reached(self, metrics: Mapping[str, float]) -> str | None:
        """The first criterion that `metrics` meet, in words, or None."""
        for key, threshold in self.thresholds.items():
            value = metrics.get(_resolve(key, metrics))
            if value is not None and value >= threshold:
                return f"{_resolve(key, metrics)} = {value:g} reached {threshold:g}"
        return None

    def check_known(self, metrics: Mapping[str, float]) -> None:
        """Refuses a key that the results lack; call it with each iteration's metrics.

        Two kinds may come later: evaluation metrics, with the first evaluation, and metrics of
        finished episodes, with the first one that ends.
        """
        self._iterations += 1
        for key in self.thresholds:
            name = _resolve(key, metrics)
            if name in metrics:
                continue
            slashed = key.replace(".", "/")
            if slashed.startswith("evaluation/") and self._iterations < self._evaluation_interval:
                continue
            if slashed.split("/")[-1].startswith("episode_") and "/" in slashed:
                continue
            raise ConfigError(
                f"stop: the results have no metric {key!r}{hint(slashed, metrics)}"
                f"{_evaluation_advice(slashed, self._evaluation_interval)}"
            )


def _resolve(key: str, metrics: Mapping[str, float]) -> str:
    return key if key in metrics else key.replace(".", "/")


def _evaluation_advice(key: str, interval: int) -> str:
    if key.startswith("evaluation/") and not interval:
        return " (evaluation is off: set evaluation_interval)"
    return ""
