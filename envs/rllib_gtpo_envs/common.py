"""What the ready-made tasks share: checked knobs, disjoint splits, and demonstrations' messages."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rllib_gtpo.errors import ConfigError, did_you_mean
from rllib_gtpo.types import Message, Task

SPLITS = {
    "train": range(80),
    "validation": range(80, 90),
    "test": range(90, 100),
}
"""The split of a problem: its hash, in percent."""


def distinct_tasks(
    draw: Callable[[random.Random], Task | None], split: str, wanted: int, seed: int
) -> tuple[Task, ...]:
    """`wanted` tasks with distinct questions; a hash of the question decides its split.

    So no task is in two splits, whatever the seed.  `draw` returns a task without its id, or None
    for one that is not wanted.
    """
    if split not in SPLITS:
        raise ConfigError(f"split={split!r}: use one of {', '.join(SPLITS)}.")
    rng = random.Random(f"{seed}-{split}")
    found: dict[str, Task] = {}
    misses = 0
    while len(found) < wanted:
        task = draw(rng)
        question = "" if task is None else str(task["question"])
        share = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4]) % 100
        if task is None or question in found or share not in SPLITS[split]:
            misses += 1
            if misses > 50_000:
                raise ConfigError(
                    f"env_config: {split}={wanted}: there are not that many different problems "
                    f"({len(found)} found): ask for fewer, or widen what they are drawn from."
                )
            continue
        misses = 0
        found[question] = {"id": f"{split}-{len(found)}", **task}
    return tuple(found.values())


def assistant(content: str) -> Message:
    """What the model says."""
    return {"role": "assistant", "content": content}


def answered(content: str) -> Message:
    """What a tool says."""
    return {"role": "tool", "content": content}


def wrong_number(answer: str, rng: random.Random) -> str:
    """A number of about the size of the answer, which it is not."""
    off = rng.randint(1, max(9, int(answer) // 5))
    return str(int(answer) + (off if off > int(answer) or rng.random() < 0.5 else -off))


def check_names(given: Iterable[str], known: list[str], where: str) -> None:
    """Refuses an unknown key, naming the nearest valid one."""
    for name in given:
        if name not in known:
            raise ConfigError(f"{where} has an unknown key {name!r}{did_you_mean(name, known)}")


def check_whole(name: str, value: Any, low: int) -> None:
    """Refuses what is not a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"env_config: {name}={value!r}: a whole number, at least {low}.")


def check_range(name: str, value: Any, low: int, high: int) -> None:
    """Refuses what is not a pair of whole numbers in order, within the bounds."""
    pair = isinstance(value, tuple) and len(value) == 2
    whole = pair and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    if not whole or not low <= value[0] <= value[1] <= high:
        raise ConfigError(
            f"env_config: {name}={value!r}: two whole numbers [least, most], {low} to {high}."
        )


def checked_weights(given: Any, defaults: Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Weights of behaviours by name; one that is left out is 0."""
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"env_config: demonstrations={given!r}: a weight for each behaviour, by name."
        )
    check_names(given, list(defaults), "env_config: demonstrations")
    for name, weight in given.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"env_config: demonstrations: {name}={weight!r}: at least 0.")
    if not sum(given.values()) > 0:
        raise ConfigError("env_config: demonstrations: at least one weight must be above 0.")
    return tuple((name, float(given.get(name, 0.0))) for name in defaults)
