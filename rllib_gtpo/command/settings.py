"""Settings that come as text: strict keys, `--override a.b=c`, YAML with line numbers."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from rllib_gtpo.command.stopping import hint
from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

Where = Callable[[str], str]
"""Maps a key to a prefix such as "task.yaml:12: ", or to ""."""


class _UnknownName(ConfigError):
    """Says which key is wrong, for the caller that knows its place."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


_EXTRA_KEYS = frozenset({"model_config", "num_workers", "num_cpus_for_driver"})


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number (YAML 1.1 wants 1.0e-4), keys do not repeat."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, name: str) -> tuple[Any, dict[tuple[str, ...], int]]:
    """Parses `text`; also the line (from 1) of each mapping key by its path."""
    lines: dict[tuple[str, ...], int] = {}

    def visit(node: yaml.Node | None, path: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            here = (*path, str(key.value))
            line = key.start_mark.line + 1
            if here in lines:
                raise ConfigError(f"{name}:{line}: {here[-1]!r} is also set on line {lines[here]}")
            lines[here] = line
            visit(value, here)

    try:
        visit(yaml.compose(text, Loader=_Loader), ())
        return yaml.load(text, Loader=_Loader), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{name}{line}: not valid YAML: {getattr(error, 'problem', error)}"
        ) from error


def parse_assignment(text: str, option: str) -> tuple[str, Any]:
    """ "a.b=4" -> ("a.b", 4); the value is YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"{option} takes KEY=VALUE, not {text!r}")
    return key.strip(), parse_yaml(value, f"{option} {text}")[0]


def parse_stop(texts: Iterable[str]) -> dict[str, Any]:
    """The thresholds of several `--stop KEY=VALUE`."""
    return dict(parse_assignment(text, "--stop") for text in texts)


def apply_overrides(config: AlgorithmConfig, texts: Iterable[str]) -> None:
    """Applies `--override` options in order."""
    for text in texts:
        key, value = parse_assignment(text, "--override")
        root, *rest = key.split(".")
        settings = {root: _merged(config, root, rest, value) if rest else value}
        prefix = f"--override {text}: "
        apply_settings(config, settings, lambda _, prefix=prefix: prefix)  # type: ignore[misc]


def apply_settings(
    config: AlgorithmConfig, settings: Mapping[str, Any], where: Where = lambda _: ""
) -> None:
    """Sets `settings` on `config`, refusing names that it does not know.

    Configs of this package check names themselves; RLlib's would set any attribute.
    """
    settings = dict(settings)
    try:
        if _checks_names_itself(config):
            config.update_from_dict(settings)
            return
        _check_names(config, settings)
        model_config = settings.pop("model_config", None)
        config.update_from_dict(settings)
        if model_config is not None:
            config.rl_module(model_config=_model_config(config, model_config))
    except _UnknownName as error:
        raise ConfigError(where(error.key) + str(error)) from error
    except ConfigError as error:
        raise ConfigError(_located(str(error), settings, where)) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        message = f"{type(config).__name__} refuses the settings: {error}"
        raise ConfigError(_located(message, settings, where)) from error


def valid_names(config: AlgorithmConfig) -> set[str]:
    """The names that can be set on a config of RLlib."""
    names = set(config.to_dict()) | set(vars(config)) | _EXTRA_KEYS
    for cls in type(config).__mro__:
        names |= {n for n, v in vars(cls).items() if isinstance(v, property) and v.fset}
    return {n for n in names if not n.startswith("_") and n != "algo_class"}


def _checks_names_itself(config: AlgorithmConfig) -> bool:
    owner = next(c for c in type(config).__mro__ if "update_from_dict" in vars(c))
    return not owner.__module__.startswith("ray.")


def _check_names(config: AlgorithmConfig, settings: Mapping[str, Any]) -> None:
    names = valid_names(config)
    for key in settings:
        if key not in names:
            message = f"{type(config).__name__} has no setting {key!r}{hint(key, names)}"
            raise _UnknownName(message, key)
    evaluation = settings.get("evaluation_config")
    if isinstance(evaluation, Mapping):
        _check_names(config, evaluation)


def _model_config(config: AlgorithmConfig, new: Any) -> Any:
    """Merges `new` into the present model config; a default model's names are known."""
    if not isinstance(new, Mapping):
        raise _UnknownName(f"model_config must be a mapping, not {new!r}", "model_config")
    present = _as_dict(config._model_config)
    if config._rl_module_spec is None:
        from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

        names = {f.name for f in dataclasses.fields(DefaultModelConfig)} | set(present)
        names |= set(config._model_config_auto_includes)
        for key in new:
            if key not in names:
                message = f"the default model has no setting {key!r}{hint(key, names)}"
                raise _UnknownName(message, key)
    return {**present, **new}


def _merged(config: AlgorithmConfig, root: str, rest: list[str], value: Any) -> Any:
    """The mapping `root` of `config` with one nested key replaced."""
    attribute_name = getattr(config, "attribute_name", None)  # where a config keeps a setting
    if callable(attribute_name):
        attribute = str(attribute_name(root))
    elif root == "model_config":
        attribute = "_model_config"
    else:
        attribute = config._translate_special_keys(root, warn_deprecated=False)
    present = getattr(config, attribute, None)
    if present is not None and not isinstance(present, Mapping) and not _is_data(present):
        raise ConfigError(
            f"--override {'.'.join([root, *rest])}: {root!r} is {present!r}, not a mapping"
        )
    tree = copy.deepcopy(_as_dict(present))
    branch = tree
    for key in rest[:-1]:
        child = branch.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--override {'.'.join([root, *rest])}: {key!r} is not a mapping")
        branch = child
    branch[rest[-1]] = value
    return tree


def _is_data(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _as_dict(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value) if _is_data(value) else dict(value or {})


def _located(message: str, settings: Mapping[str, Any], where: Where) -> str:
    """Puts the place of the first setting that `message` quotes in front of it."""
    places = []
    for key in settings:
        found = re.search(rf"['\"`]{re.escape(key)}['\"`]", message)
        if found:
            places.append((found.start(), key))
    return where(min(places)[1] if places else "") + message
