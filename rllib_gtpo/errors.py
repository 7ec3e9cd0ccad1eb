"""One error per boundary.  Each message says what happened and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHORT_LIST = 20


class GTPOError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(GTPOError, ValueError):
    """A setting is unknown, contradictory, or has no effect."""


class DataError(GTPOError, ValueError):
    """A dataset or task row is unusable; the message names the file and the row."""


class ChatTemplateError(GTPOError, ValueError):
    """A tokenizer's chat template cannot give exact incremental rendering."""


class EnvironmentFault(GTPOError, RuntimeError):
    """An environment is broken in a way that no single rollout can absorb."""


class RewardError(GTPOError, ValueError):
    """A reward function returned something that is not a set of finite named components."""


class EmbedderError(GTPOError, RuntimeError):
    """A text could not be embedded, so that its similarity to others is unknown."""


class EngineError(GTPOError, RuntimeError):
    """The rollout engine failed; the rollouts it held are lost."""


class Interrupted(GTPOError):
    """A stop was asked for in the middle of a long step; state is consistent and can be saved.

    changed: Whether it is another state than before the step.
    """

    def __init__(self, message: str = "", *, changed: bool = True) -> None:
        super().__init__(message)
        self.changed = changed


def did_you_mean(name: object, valid: Iterable[object]) -> str:
    """The end of a message about a wrong name: the nearest valid one, and all if they are few."""
    names = [str(v) for v in valid]
    if not names:
        return ""
    few = len(names) <= _SHORT_LIST
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0 if few else 0.6)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return guess + (f" (valid: {', '.join(names)})" if few else "")


def refuse_unknown_keys(where: str, settings: Iterable[str], known: Iterable[str]) -> None:
    """Raises ConfigError for the first key of a dict of settings that is not known."""
    names = list(known)
    for key in settings:
        if key not in names:
            raise ConfigError(f"{where} has an unknown key {key!r}{did_you_mean(key, names)}")
