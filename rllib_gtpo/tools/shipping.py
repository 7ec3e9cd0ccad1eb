"""Whether an environment can go to other processes and into checkpoints: told before a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from ray import cloudpickle

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.tools.schema import Tool

_DEPTH = 4  # how far to look for the variable that is to blame


def refuse_unserialisable(env: Any, env_config: Mapping[str, Any]) -> None:
    """Raises ConfigError for an environment class or configuration that cannot be pickled.

    A class that other processes can import goes by its name, whatever its tools hold.
    """
    for key, value in env_config.items():
        if _fails(value):
            raise ConfigError(
                f"env_config[{key!r}] cannot be sent to other processes: {_blame(value)}.  Give "
                "what it is made from, and make it in the environment's __init__."
            )
    if not inspect.isclass(env) or not _fails(env):
        return
    for tool in getattr(env, "tools", ()):
        if _fails(tool):
            name = getattr(tool, "name", None) or getattr(tool, "__name__", repr(tool))
            raise ConfigError(
                f"Tool '{name}' of {env.__name__} cannot be sent to other processes (env runners, "
                f"checkpoints): {_blame(tool)}.  Make that inside the tool, or in reset() of the "
                "environment; or keep the tool in a module and write "
                f"tools = ['package.module:{name}'], which every process imports for itself."
            )
    raise ConfigError(
        f"{env.__name__} cannot be sent to other processes (env runners, checkpoints): "
        f"{_blame(env)}.  Make that in __init__ or reset(), or keep the class in a module that "
        "every process can import."
    )


def _fails(thing: Any) -> bool:
    try:
        cloudpickle.dumps(thing)
    except Exception:
        return True
    return False


def _blame(thing: Any) -> str:
    """Which variable, of which type, cannot be pickled."""
    path: list[str] = []
    while len(path) < _DEPTH:
        found = next(((n, v) for n, v in _parts(thing).items() if _fails(v)), None)
        if found is None:
            break
        path.append(found[0])
        thing = found[1]
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}".removeprefix("builtins.")
    return f"its '{'.'.join(path)}' is a {kind}" if path else f"{kind} cannot be pickled"


def _parts(thing: Any) -> dict[str, Any]:
    """What a function or object is pickled with, by name."""
    if isinstance(thing, Tool):
        return _parts(thing.fn)
    if isinstance(thing, functools.partial):
        given = {f"argument {index}": value for index, value in enumerate(thing.args)}
        return {**_parts(thing.func), **given, **thing.keywords}
    if inspect.ismethod(thing):
        return {**_parts(thing.__func__), **_parts(thing.__self__)}
    if inspect.isfunction(thing):
        used = inspect.getclosurevars(thing)
        return {**used.nonlocals, **used.globals, **(thing.__kwdefaults__ or {})}
    if isinstance(thing, dict):
        return {str(key): value for key, value in thing.items()}
    return dict(getattr(thing, "__dict__", {}))
