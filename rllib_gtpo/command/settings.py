"""Puts settings that come as text on a config: strict names, types, search spaces."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rllib_gtpo.command.places import Places
from rllib_gtpo.command.search_spaces import BadSpace, has_space, make_spaces
from rllib_gtpo.command.setting_types import wrong_type
from rllib_gtpo.command.stopping import hint
from rllib_gtpo.command.yaml_text import Path, parse_assignment
from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

CONFIG: Path = ("config",)  # where settings are in an experiment
_EXTRA_KEYS = frozenset({"model_config", "num_workers", "num_cpus_for_driver"})
_SHOWN_AS = {  # what RLlib keeps under another name than the one that sets it
    "lambda_": "lambda",
    "input_": "input",
    "framework_str": "framework",
    "callbacks_class": "callbacks",
}


class _BadSetting(ConfigError):
    """Says which setting is wrong, for the caller that knows its place."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


def apply_overrides(
    config: AlgorithmConfig,
    texts: Iterable[str],
    places: Places | None = None,
    option: str = "--override",
) -> None:
    """Applies options KEY=VALUE in order, and notes in `places` that they did."""
    places = Places() if places is None else places
    for text in texts:
        key, value = parse_assignment(text, option)
        root, *rest = key.split(".")
        own = Places()
        own.set_value((*CONFIG, root, *rest), value, f"{option} {text}")
        own.file = f"{option} {text}"
        settings = {root: _merged(config, root, rest, value, own.file) if rest else value}
        apply_settings(config, settings, own)
        places.set_value((*CONFIG, root, *rest), value, own.file)


def apply_settings(
    config: AlgorithmConfig, settings: Mapping[str, Any], places: Places | None = None
) -> None:
    """Sets `settings` on `config`, refusing names, types and search spaces that make no sense.

    Configs of this package check names themselves; RLlib's would set any attribute.
    """
    places = Places() if places is None else places
    try:
        settings = make_spaces(settings)
        own = _checks_names_itself(config)
        _check(config, settings, (), names=None if own else valid_names(config))
        if own:
            config.update_from_dict(settings)
            return
        settings = dict(settings)
        model_config = settings.pop("model_config", None)
        config.update_from_dict(settings)
        if model_config is not None:
            config.rl_module(model_config=_model_config(config, model_config))
    except (BadSpace, _BadSetting) as error:
        raise ConfigError(places.prefix((*CONFIG, *error.path)) + str(error)) from error
    except ConfigError as error:
        raise ConfigError(places.prefix_of(str(error), CONFIG) + str(error)) from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        key = _refused(config, settings)
        message = f"{type(config).__name__} refuses {key or 'the settings'}: {error}"
        raise ConfigError(places.prefix((*CONFIG, key)) + message) from error


def valid_names(config: AlgorithmConfig) -> set[str]:
    """The names that can be set on a config of RLlib."""
    names = set(config.to_dict()) | set(vars(config)) | _EXTRA_KEYS
    for cls in type(config).__mro__:
        names |= {n for n, v in vars(cls).items() if isinstance(v, property) and v.fset}
    return {n for n in names if not n.startswith("_") and n != "algo_class"}


def attribute_of(config: AlgorithmConfig, key: str) -> str:
    """Where a config keeps a setting."""
    attribute_name = getattr(config, "attribute_name", None)
    if callable(attribute_name):
        return str(attribute_name(key))
    if key == "model_config":
        return "_model_config"
    return str(config._translate_special_keys(key, warn_deprecated=False))


def shown_name(attribute: str) -> str:
    """The name that sets an attribute of RLlib's configs."""
    return _SHOWN_AS.get(attribute, attribute.removeprefix("_"))


def _checks_names_itself(config: AlgorithmConfig) -> bool:
    owner = next(c for c in type(config).__mro__ if "update_from_dict" in vars(c))
    return not owner.__module__.startswith("ray.")


def _check(
    config: AlgorithmConfig, settings: Mapping[str, Any], path: Path, names: set[str] | None
) -> None:
    for key, value in settings.items():
        if names is not None and key not in names:
            message = f"{type(config).__name__} has no setting {key!r}{hint(str(key), names)}"
            raise _BadSetting(message, (*path, str(key)))
        reason = wrong_type(config, str(key), value)
        if reason:
            raise _BadSetting(reason, (*path, str(key)))
    evaluation = settings.get("evaluation_config")
    if isinstance(evaluation, Mapping) and not has_space(evaluation):
        _check(config, evaluation, (*path, "evaluation_config"), names)


def _refused(config: AlgorithmConfig, settings: Mapping[str, Any]) -> str:
    """The setting that a config does not take, "" if it takes each alone."""
    for key, value in settings.items():
        try:
            config.copy(copy_frozen=False).update_from_dict({key: value})
        except (TypeError, ValueError, KeyError, AttributeError):
            return str(key)
    return ""


def _model_config(config: AlgorithmConfig, new: Any) -> Any:
    """Merges `new` into the present model config; a default model's names are known."""
    if not isinstance(new, Mapping):
        raise _BadSetting(f"model_config must be a mapping, not {new!r}", ("model_config",))
    present = _as_dict(config._model_config)
    if config._rl_module_spec is None:
        from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

        names = {f.name for f in dataclasses.fields(DefaultModelConfig)} | set(present)
        names |= set(config._model_config_auto_includes)
        for key in new:
            if key not in names:
                message = f"the default model has no setting {key!r}{hint(str(key), names)}"
                raise _BadSetting(message, ("model_config", str(key)))
    return {**present, **new}


def _merged(
    config: AlgorithmConfig, root: str, rest: list[str], value: Any, option: str
) -> dict[str, Any]:
    """The mapping `root` of `config` with one nested key replaced."""
    present = getattr(config, attribute_of(config, root), None)
    if present is not None and not isinstance(present, Mapping) and not _is_data(present):
        raise ConfigError(f"{option}: {root!r} is {present!r}, not a mapping")
    tree = copy.deepcopy(_as_dict(present))
    branch = tree
    for key in rest[:-1]:
        child = branch.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{option}: {key!r} is not a mapping")
        branch = child
    branch[rest[-1]] = value
    return tree


def _is_data(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _as_dict(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value) if _is_data(value) else dict(value or {})
