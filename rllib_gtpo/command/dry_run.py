"""`rllib train ... --dry-run`: the whole configuration as YAML, with where each value came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rllib_gtpo.command.plain_values import plain
from rllib_gtpo.command.search_spaces import is_space, spaces_of
from rllib_gtpo.command.settings import CONFIG, attribute_of, shown_name
from rllib_gtpo.command.trial import OK, checkpoint_frequency
from rllib_gtpo.command.yaml_text import Path, dump_inline

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    from rllib_gtpo.command.files import Experiment
    from rllib_gtpo.command.resolve import Resolved
    from rllib_gtpo.command.run import RunOptions

_COMMENTS_AT = 48  # the column of comments, unless a value is longer
_NOT_SETTINGS = ("algo_class", "_is_frozen", "env")  # the first and the last are shown elsewhere
_MISSING = object()


@dataclasses.dataclass(frozen=True)
class _Leaf:
    path: Path
    value: Any
    place: str
    changed: bool = True


def print_resolved(resolved: Resolved, options: RunOptions) -> int:
    """Prints what would be trained; returns the exit code."""
    print("\n".join(_page(resolved, options)), flush=True)
    return OK


def _page(resolved: Resolved, options: RunOptions) -> Iterator[str]:
    experiment = resolved.experiment
    needs = ", ".join(f"{amount:g} {name}" for name, amount in resolved.needs.items())
    yield "# checked; nothing was started"
    yield f"# {'each trial' if resolved.is_sweep else 'the run'} needs {needs or 'no resources'}"
    if resolved.is_sweep:
        spaces = [
            ".".join((shown_name(path[0]), *path[1:])) for path in spaces_of(experiment.config)
        ]
        yield f"# a sweep; Tune chooses {', '.join(spaces) or 'nothing: its trials are alike'}"
    if not resolved.criteria:
        yield "# no stop criterion: until Ctrl-C"
    leaves = list(_settings(experiment))
    roots = {leaf.path[1] for leaf in leaves if leaf.changed}  # a mapping stays in one piece
    changed = [leaf for leaf in leaves if leaf.path[1] in roots]
    rest = [leaf for leaf in leaves if leaf.path[1] not in roots]
    yield f"{dump_inline(experiment.name)}:"
    yield from _rows([*_frame(resolved, options), *changed])
    if options.show_all:
        yield from _rows(rest, opened=CONFIG if changed else ())
    else:
        yield f"    # {len(rest)} more have their defaults; --all shows them"


def _rows(leaves: Iterable[_Leaf], opened: Path = ()) -> Iterator[str]:
    """Block YAML; `opened`: the mapping that the line before was in."""
    for leaf in leaves:
        *parents, key = leaf.path
        for depth, parent in enumerate(parents):
            if tuple(parents[: depth + 1]) != opened[: depth + 1]:
                yield "  " * (depth + 1) + f"{dump_inline(parent)}:"
        opened = tuple(parents)
        row = "  " * len(leaf.path) + f"{dump_inline(key)}: {dump_inline(leaf.value)}"
        yield f"{row:<{_COMMENTS_AT}}  # {' '.join(leaf.place.split())}"


def _frame(resolved: Resolved, options: RunOptions) -> Iterator[_Leaf]:
    """What is not in the config."""
    experiment = resolved.experiment
    places = experiment.places

    def leaf(value: Any, *path: str) -> _Leaf:
        return _Leaf(path, value, places.of(path) or places.file or "default")

    yield leaf(experiment.algorithm, "run")
    env = plain(experiment.config.env, experiment.file)
    found = leaf(env, "env")
    yield dataclasses.replace(found, place=places.get((*CONFIG, "env"), found.place))
    for path, value in _flat(experiment.stop, ("stop",)) if experiment.stop else ():
        yield leaf(value, *path)
    if experiment.num_samples != 1:
        yield leaf(experiment.num_samples, "num_samples")
    for key in ("checkpoint_freq", "checkpoint_minutes"):
        option, of_file = getattr(options, key), getattr(experiment, key)
        if option is not None:
            yield _Leaf((key,), option, f"--{key.replace('_', '-')} {option:g}")
        elif of_file is not None:
            yield leaf(of_file, key)
        elif key == "checkpoint_freq":
            yield _Leaf((key,), checkpoint_frequency(None, None), "default")


def _settings(experiment: Experiment) -> Iterator[_Leaf]:
    """Every setting of the config, by the name under which it was set or can be set."""
    from ray._common.deprecation import DEPRECATED_VALUE

    config, places = experiment.config, experiment.places
    baselines = _baselines(type(config))
    roots = dict.fromkeys(path[1] for path in places if path[:1] == CONFIG and len(path) > 1)
    written = {attribute_of(config, root): root for root in roots}
    for attribute, value in _in_order(config, written):
        own = baselines[-1][1].get(attribute, _MISSING)
        if attribute in _NOT_SETTINGS or (value is own and value == DEPRECATED_VALUE):
            continue
        if attribute.startswith("_") and not hasattr(type(config), attribute[1:]) and value == own:
            continue  # RLlib's own bookkeeping
        name = written.get(attribute) or _name(config, attribute)
        if name is None:
            continue
        for path, each in _flat(value, (attribute,)):
            shown, defaults = plain(each, experiment.file), [_at(b, path) for _, b in baselines]
            here = (*CONFIG, name, *path[1:])
            changed = here in places or _differs(shown, defaults[-1])
            place = places.of(here) or places.file if changed else _default(defaults, baselines)
            yield _Leaf(here, shown, str(place), changed)


def _in_order(config: AlgorithmConfig, written: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Settings as they were written, then the others."""
    have = vars(config)
    private = {name: f"_{name}" for name in written if f"_{name}" in have}  # behind a property
    first = [private.get(name, name) for name in written if private.get(name, name) in have]
    for attribute in dict.fromkeys([*first, *have]):
        yield attribute, have[attribute]


def _name(config: AlgorithmConfig, attribute: str) -> str | None:
    """The name that sets an attribute, None for one that another setting of that name hides."""
    setting_names = getattr(config, "setting_names", None)
    if callable(setting_names):
        if attribute_of(config, attribute) != attribute:
            return None
        for name in setting_names() & vars(config).keys() - {attribute}:
            if attribute_of(config, name) == attribute:
                return str(name)
    return shown_name(attribute)


def _flat(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested mappings; a search space is one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = plain(value)
    if isinstance(value, Mapping) and value and not is_space(value):
        for key, item in value.items():
            yield from _flat(item, (*path, str(key)))
    else:
        yield path, value


def _baselines(config_class: type) -> list[tuple[str, dict[str, Any]]]:
    """Whose defaults a config class has, the most general first."""
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    found = []
    for cls in reversed(config_class.__mro__):
        if issubclass(cls, AlgorithmConfig):
            module = cls.__module__.split(".")[0]
            owner = {"ray": "RLlib", "rllib_gtpo": "package"}.get(module, cls.__name__)
            found.append((f"{owner} default", dict(vars(cls()))))
    return found


def _default(defaults: list[Any], baselines: list[tuple[str, Any]]) -> str:
    """The class that the default was last changed in."""
    place = len(defaults) - 1
    while place and not _differs(plain(defaults[place - 1]), defaults[-1]):
        place -= 1
    return baselines[place][0]


def _at(tree: Any, path: Path) -> Any:
    for key in path:
        if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
            tree = plain(tree)
        if not isinstance(tree, Mapping) or key not in tree:
            return _MISSING
        tree = tree[key]
    return tree


def _differs(shown: Any, default: Any) -> bool:
    return default is _MISSING or shown != plain(default)
