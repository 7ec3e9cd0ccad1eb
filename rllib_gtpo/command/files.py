"""Experiment files: X.py with `config` and `stop`, or YAML {name: {run, env, config, stop}}."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rllib_gtpo.command.quiet import registering
from rllib_gtpo.command.settings import apply_settings, parse_yaml
from rllib_gtpo.command.stopping import hint
from rllib_gtpo.command.tuning import read_tuning
from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

_OWN_ALGORITHMS = ("GTPO", "GRPO", "SFT")
_YAML_KEYS = ("run", "env", "config", "stop", "num_samples", "checkpoint_freq")


@dataclass
class Experiment:
    """What a file asks for.

    tune_config: A ray.tune.TuneConfig, or None.
    callbacks: Of Tune; also of a single trial.
    """

    name: str
    file: Path
    config: AlgorithmConfig
    stop: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 1
    checkpoint_freq: int | None = None
    tune_config: Any = None
    callbacks: list[Any] = field(default_factory=list)

    @property
    def algorithm(self) -> str:
        """The algorithm's class name."""
        cls = self.config.algo_class
        return cls if isinstance(cls, str) else getattr(cls, "__name__", str(cls))


def load_experiment(path: Path) -> Experiment:
    """Loads a Python or YAML experiment.

    Raises:
        ConfigError: The file is missing or broken, or a name in it is unknown.
    """
    if not path.is_file():
        near_by = [p.name for p in path.parent.glob("*") if p.suffix in (".py", ".yaml", ".yml")]
        raise ConfigError(f"there is no file {path}{hint(path.name, near_by)}")
    if path.suffix == ".py":
        return _load_python(path)
    if path.suffix in (".yaml", ".yml"):
        return _load_yaml(path)
    raise ConfigError(f"{path}: an experiment is a .py or .yaml file")


def get_algorithm(name: str, where: str = "") -> type[Algorithm]:
    """The algorithm class that Tune knows as `name`."""
    from ray.rllib.algorithms.registry import ALGORITHMS
    from ray.tune.error import TuneError
    from ray.tune.registry import get_trainable_cls

    try:
        with registering():
            return get_trainable_cls(name)
    except TuneError:
        names = sorted({*ALGORITHMS, *_OWN_ALGORITHMS})
        lookup = {n.lower(): n for n in names}
        close = lookup.get(name.lower())
        suggestion = f"; did you mean {close!r}?" if close else hint(name, names)
        raise ConfigError(
            f"{where}unknown algorithm {name!r}{suggestion} Known: {', '.join(names)}"
        ) from None


def check_env(config: AlgorithmConfig, where: str = "") -> None:
    """Refuses an environment name that neither Ray nor gymnasium knows."""
    env = config.env
    if not isinstance(env, str) or "." in env or ":" in env:
        return  # a class, or a path to one that the runners import
    import gymnasium
    from ray.tune.registry import ENV_CREATOR, _global_registry

    if _global_registry.contains(ENV_CREATOR, env):
        return
    try:
        gymnasium.spec(env)
    except gymnasium.error.Error:
        advice = hint(env, gymnasium.registry)
        raise ConfigError(f"{where}unknown environment {env!r}{advice}") from None


def _load_python(path: Path) -> Experiment:
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

    module = _import(path)
    config = getattr(module, "config", None)
    if not isinstance(config, AlgorithmConfig):
        found = "defines no" if config is None else f"has a {type(config).__name__} as its"
        raise ConfigError(f"{path} {found} `config`: set `config = PPOConfig()...` at module level")
    stop = getattr(module, "stop", None) or {}
    if not isinstance(stop, dict):
        raise ConfigError(f"{path}: `stop` must be a dict, not {type(stop).__name__}")
    tune_config, callbacks, num_samples = read_tuning(module, path)
    # A copy: overrides must not leak into a module that somebody imports again.
    config = config.copy(copy_frozen=False)
    return Experiment(
        name=path.stem,
        file=path,
        config=config,
        stop=dict(stop),
        num_samples=num_samples,
        tune_config=tune_config,
        callbacks=callbacks,
    )


def _import(path: Path) -> ModuleType:
    """Imports `path` under a name of its own, so that its classes reach Ray's workers by value."""
    import ray.cloudpickle

    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    name = f"rllib_file_{path.stem.replace('-', '_')}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as `python X.py` does; Ray hands sys.path on to local workers
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(_import_message(path, error)) from error
    ray.cloudpickle.register_pickle_by_value(module)
    return module


def _import_message(path: Path, error: BaseException) -> str:
    own = str(path.absolute())  # as importlib names it
    if isinstance(error, SyntaxError) and error.filename == own:
        return f"{path}:{error.lineno}: SyntaxError: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    place = f"{path}:{frames[-1].lineno}" if frames else str(path)
    return f"{place}: {type(error).__name__}: {error}"


def _load_yaml(path: Path) -> Experiment:
    tree, lines = parse_yaml(path.read_text(), str(path))
    if not isinstance(tree, dict) or len(tree) != 1:
        count = len(tree) if isinstance(tree, dict) else 0
        raise ConfigError(f"{path}: one experiment {{name: {{run: ...}}}} expected, found {count}")
    name, spec = next(iter(tree.items()))
    name = str(name)

    def where(*keys: str) -> str:
        line = lines.get((name, *keys))
        return f"{path}:{line}: " if line else f"{path}: "

    if not isinstance(spec, dict) or "run" not in spec:
        raise ConfigError(f"{where()}{name!r} needs `run: ALGORITHM`")
    for key in spec:
        if key not in _YAML_KEYS:
            raise ConfigError(f"{where(str(key))}unknown key {key!r}{hint(str(key), _YAML_KEYS)}")
    config = get_algorithm(str(spec["run"]), where("run")).get_default_config()
    if spec.get("env") is not None:
        config.environment(spec["env"])
    settings = spec.get("config") or {}
    for key, kind in (("config", settings), ("stop", spec.get("stop") or {})):
        if not isinstance(kind, dict):
            raise ConfigError(f"{where(key)}`{key}` must be a mapping")
    apply_settings(config, settings, lambda key: _setting_line(path, name, lines, key))
    return Experiment(
        name=name,
        file=path,
        config=config,
        stop=dict(spec.get("stop") or {}),
        num_samples=int(spec.get("num_samples") or 1),
        checkpoint_freq=spec.get("checkpoint_freq"),
    )


def _setting_line(path: Path, name: str, lines: dict[tuple[str, ...], int], key: str) -> str:
    """The place of a setting, however deep it lies under `config`."""
    for place, line in lines.items():
        if place[:2] == (name, "config") and key and place[-1] == key and len(place) > 2:
            return f"{path}:{line}: "
    return f"{path}: "
