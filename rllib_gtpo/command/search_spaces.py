"""Values that Tune chooses: `{grid_search: [1, 2]}`, `{loguniform: [1e-5, 1e-3]}`, ... in YAML.

A mapping whose only key is one of the names below is a search space, wherever it stands.  The
names, and what they take, are those of `ray.tune`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rllib_gtpo.command.yaml_text import Path
from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

GRID = "grid_search"
SAMPLERS = (
    GRID,
    *("uniform", "quniform", "loguniform", "qloguniform", "randn", "qrandn"),
    *("randint", "qrandint", "lograndint", "qlograndint", "choice"),
)
_LISTS = (GRID, "choice")  # these take one list, the others a list of arguments
_NOT_ARGUMENTS = ("base",)  # deprecated in Tune


class BadSpace(ConfigError):
    """A search space makes no sense; `path` says which."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


def is_space(value: Any) -> bool:
    """Whether Tune has to choose `value`."""
    from ray.tune.search.sample import Domain

    return isinstance(value, Domain) or (isinstance(value, Mapping) and set(value) == {GRID})


def has_space(value: Any) -> bool:
    """Whether there is a search space in `value`, however deep."""
    return next(_spaces(value, ()), None) is not None


def make_spaces(value: Any, path: Path = ()) -> Any:
    """`value` from YAML with search spaces in place of the mappings that mean them.

    Raises:
        BadSpace: Arguments are missing, too many, or impossible.
    """
    if isinstance(value, Mapping):
        name = next(iter(value)) if len(value) == 1 else None
        if name in SAMPLERS:
            return _make(str(name), value[name], (*path, str(name)))
        return {key: make_spaces(item, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [make_spaces(item, (*path, str(i))) for i, item in enumerate(value)]
    return value


def _make(name: str, given: Any, path: Path) -> Any:
    from ray import tune

    if name in _LISTS:
        if not isinstance(given, list) or not given:
            raise BadSpace(f"{name} takes a list of values, not {given!r}", path)
        values = make_spaces(given, path)
        return {GRID: values} if name == GRID else tune.choice(values)
    sampler = getattr(tune, name)
    known = [p for p in inspect.signature(sampler).parameters if p not in _NOT_ARGUMENTS]
    usage = f"{name} takes [{', '.join(known)}]"
    arguments = dict(given) if isinstance(given, Mapping) else None
    if isinstance(given, list) and len(given) <= len(known):
        arguments = dict(zip(known, given, strict=False))
    if arguments is None or not set(arguments) <= set(known):
        raise BadSpace(f"{usage}, not {given!r}", path)
    for key, number in arguments.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BadSpace(f"{usage}: {key} is no number: {number!r}", path)
        if "int" in name and not isinstance(number, int):
            raise BadSpace(f"{usage}: {key} is no whole number: {number!r}", path)
    if {"lower", "upper"} <= set(arguments) and not arguments["lower"] < arguments["upper"]:
        raise BadSpace(f"{usage}: lower must be less than upper, not {given!r}", path)
    try:
        return sampler(**arguments)
    except (TypeError, ValueError) as error:
        raise BadSpace(f"{usage}, not {given!r}: {error}", path) from error


def as_yaml(space: Any) -> dict[str, Any]:
    """What `make_spaces` would read as this search space."""
    from ray.tune.search import sample

    if isinstance(space, Mapping):
        return dict(space)
    if isinstance(space, sample.Categorical):
        return {"choice": list(space.categories)}
    sampler, step = space.get_sampler(), []
    if isinstance(sampler, sample.Quantized):
        sampler, step = sampler.sampler or space.default_sampler_cls(), [sampler.q]
    prefix = "q" if step else ""
    if isinstance(sampler, sample.Normal):
        return {f"{prefix}randn": [sampler.mean, sampler.sd, *step]}
    if not isinstance(space, sample.Float | sample.Integer):
        return {"sample_from": str(space)}
    kind = "randint" if isinstance(space, sample.Integer) else "uniform"
    log = "log" if isinstance(sampler, sample.LogUniform) else ""
    return {f"{prefix}{log}{kind}": [space.lower, space.upper, *step]}


def spaces_of(config: AlgorithmConfig) -> list[Path]:
    """Where the search spaces of a config are."""
    return [path for path, _ in _spaces(vars(config), ())]


def _spaces(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if is_space(value):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _spaces(item, (*path, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, item in enumerate(value):
            yield from _spaces(item, (*path, str(index)))
