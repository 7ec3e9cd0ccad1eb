"""Whether a value from YAML has a type that its setting can take.

The annotations of the config's methods say it: `training(lr: float)` makes `lr: fast` an error.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, Union

from rllib_gtpo.command.search_spaces import SAMPLERS, has_space
from rllib_gtpo.errors import did_you_mean

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

# Ray takes fractions of these, whatever the annotation says.
_FRACTIONS = ("num_cpus", "num_gpus")


def wrong_type(config: AlgorithmConfig, key: str, value: Any) -> str | None:
    """Why `value` cannot be the setting `key`, or None if it can, or nobody says what can."""
    config_class: Any = type(config)
    annotations = _annotations(config_class).get(key)
    if not annotations or has_space(value):
        return None
    present = vars(config).get(key)
    if type(value) is type(present) and not isinstance(value, float):
        return None  # some defaults are not as annotated
    if key.startswith(_FRACTIONS):
        annotations = [*annotations, float]
    if any(fits(value, annotation) for annotation in annotations):
        return None
    words = dict.fromkeys(word for annotation in annotations for word in _words(annotation))
    if "a number" in words:
        words.pop("a whole number", None)
    shown = "nothing" if value is None else repr(value)
    meant = did_you_mean(next(iter(value)), SAMPLERS) if _may_be_space(value) else ""
    return f"{key} must be {' or '.join(words)}, not {shown}{meant}"


def _may_be_space(value: Any) -> bool:
    return isinstance(value, Mapping) and len(value) == 1


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value made of YAML fits an annotation; what YAML cannot hold fits nothing plain."""
    plain = _PLAIN.get(annotation)
    if plain is not None:
        return bool(plain[1](value))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    kind = origin or annotation
    if not isinstance(kind, type) or kind in (Any, object):
        return True  # also a forward reference, a type variable
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if issubclass(kind, Collection):
        return isinstance(value, list | tuple) and (
            kind is tuple or all(fits(item, each) for item in value for each in arguments[:1])
        )
    # A class, an object or a function: from YAML by its name.
    return isinstance(value, str) or not isinstance(value, bool | int | float | list | dict | None)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return _whole(value) or (isinstance(value, float) and not math.isnan(value))


_PLAIN: dict[Any, tuple[str, Any]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", _whole),
    float: ("a number", _number),
    str: ("text", lambda value: isinstance(value, str)),
    type(None): ("nothing", lambda value: value is None),
    None: ("nothing", lambda value: value is None),
}


def _words(annotation: Any) -> list[str]:
    if annotation in _PLAIN:
        return [_PLAIN[annotation][0]] if annotation not in (None, type(None)) else []
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return [word for each in arguments for word in _words(each)]
    if origin is Literal:
        return [repr(each) for each in arguments]
    kind = origin or annotation
    if isinstance(kind, type) and issubclass(kind, Mapping):
        return ["a mapping"]
    if isinstance(kind, type) and issubclass(kind, Collection):
        return ["a list"]
    return ["the name of a class or function"]


@functools.cache
def _annotations(config_class: type) -> dict[str, list[Any]]:
    """What the methods of a config class take for each setting; `evaluation(split=)` is also
    `evaluation_split`."""
    from ray.rllib.algorithms.algorithm_config import NotProvided

    found: dict[str, list[Any]] = {}
    for cls in reversed(config_class.__mro__):
        for method, function in vars(cls).items():
            if not inspect.isfunction(function):
                continue
            for name, parameter in inspect.signature(function).parameters.items():
                if parameter.default is not NotProvided:
                    continue
                annotation = _resolved(parameter.annotation, function)
                for key in (name, f"{method}_{name}"):
                    found.setdefault(key, []).append(annotation)
    return found


def _resolved(annotation: Any, function: Any) -> Any:
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, function.__globals__)
    except Exception:  # a name that is imported for type checkers only
        return Any
