"""Experiment files: X.py with `config` and `stop`, or YAML {name: {run, env, config, stop}}."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rllib_gtpo.command.places import Places
from rllib_gtpo.command.quiet import registering
from rllib_gtpo.command.search_spaces import BadSpace, is_space, make_spaces
from rllib_gtpo.command.settings import apply_settings
from rllib_gtpo.command.stopping import hint
from rllib_gtpo.command.tuning import read_tuning
from rllib_gtpo.command.yaml_text import parse_yaml
from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm
    from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

_OWN_ALGORITHMS = ("GTPO", "GRPO", "SFT")
_YAML_KEYS = (
    *("run", "env", "config", "stop", "num_samples"),
    *("checkpoint_freq", "checkpoint_minutes"),
)


@dataclass
class Experiment:
    """What a file, or the names of an algorithm and an environment, ask for.

    tune_config: A ray.tune.TuneConfig, or None.
    callbacks: Of Tune; also of a single trial.
    places: Of what was set, as in YAML.
    """

    name: str
    file: Path | None
    config: AlgorithmConfig
    stop: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 1
    checkpoint_freq: int | None = None
    checkpoint_minutes: float | None = None
    tune_config: Any = None
    callbacks: list[Any] = field(default_factory=list)
    places: Places = field(default_factory=Places)

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
        if path.is_dir():
            raise ConfigError(f"{path} is a directory: name a .py or .yaml file in it")
        near_by = [p.name for p in path.parent.glob("*") if p.suffix in (".py", ".yaml", ".yml")]
        raise ConfigError(f"there is no file {path}{hint(path.name, near_by)}")
    if path.suffix == ".py":
        return _load_python(path)
    if path.suffix in (".yaml", ".yml"):
        return _load_yaml(path)
    raise ConfigError(f"{path}: an experiment is a .py or .yaml file")


def named_experiment(algorithm: str, env: str | None) -> Experiment:
    """The default config of an algorithm, on an environment."""
    config = get_algorithm(algorithm, "--algo: ").get_default_config()
    places = Places("", {("run",): f"--algo {algorithm}"})
    if env is not None:
        config.environment(env)
        places["env",] = f"--env {env}"
    name = "_".join(filter(None, (algorithm, (env or "").rsplit(":")[-1].rsplit("/")[-1])))
    return Experiment(name, None, config, places=places)


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
    """Refuses an environment name that neither Ray, gymnasium nor Python knows, and none at all."""
    env = config.env
    if env is None and not config.is_offline and config.observation_space is None:
        raise ConfigError(
            f"{where}no environment: add `env: NAME` in YAML, --env NAME, or .environment(...)"
        )
    if not isinstance(env, str):
        return  # a class or a function
    import gymnasium
    from ray.tune.registry import ENV_CREATOR, _global_registry

    if _global_registry.contains(ENV_CREATOR, env) or ":" in env:
        return  # "module:name" is imported and looked up where it is made
    try:
        gymnasium.spec(env)
    except gymnasium.error.Error:
        if "." not in env:
            advice = hint(env, gymnasium.registry)
            raise ConfigError(f"{where}unknown environment {env!r}{advice}") from None
        _check_class(env, where)


def _check_class(name: str, where: str) -> None:
    """Refuses the name of a class that cannot be imported."""
    module_name, _, attribute = name.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{where}environment {name!r}: importing {module_name} failed: {_short(error)}"
        ) from error
    if not hasattr(module, attribute):
        advice = hint(attribute, [n for n in dir(module) if not n.startswith("_")])
        raise ConfigError(f"{where}environment {name!r}: {module_name} has no {attribute}{advice}")


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


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
    places = Places(str(path))
    given = vars(module)
    _number(given, "num_samples", -1, places)  # -1: Tune's word for without end
    tune_config, callbacks, num_samples = read_tuning(module, path)
    # A copy: overrides must not leak into a module that somebody imports again.
    config = config.copy(copy_frozen=False)
    return Experiment(
        name=path.stem,
        file=path,
        config=config,
        stop=dict(stop),
        num_samples=num_samples,
        checkpoint_freq=_number(given, "checkpoint_freq", 0, places),
        checkpoint_minutes=_number(given, "checkpoint_minutes", 0, places, float),
        tune_config=tune_config,
        callbacks=callbacks,
        places=places,
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
    _import_from_beside(path)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ConfigError(_import_message(path, error)) from error
    ray.cloudpickle.register_pickle_by_value(module)
    return module


def _import_from_beside(path: Path) -> None:
    """As `python X.py` does; Ray hands sys.path on to local workers."""
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _import_message(path: Path, error: BaseException) -> str:
    own = str(path.absolute())  # as importlib names it
    if isinstance(error, SyntaxError) and error.filename == own:
        return f"{path}:{error.lineno}: SyntaxError: {error.msg}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == own]
    place = f"{path}:{frames[-1].lineno}" if frames else str(path)
    return f"{place}: {_short(error)}"


def _load_yaml(path: Path) -> Experiment:
    tree, lines = parse_yaml(_text(path), str(path))
    if not isinstance(tree, dict) or len(tree) != 1:
        count = len(tree) if isinstance(tree, dict) else 0
        raise ConfigError(f"{path}: one experiment {{name: {{run: ...}}}} expected, found {count}")
    name, spec = next(iter(tree.items()))
    name = str(name)
    places = Places(
        str(path), {keys[1:]: f"{path}:{line}" for keys, line in lines.items() if keys[0] == name}
    )
    _import_from_beside(path)
    if not isinstance(spec, dict) or not isinstance(spec.get("run"), str):
        line = lines.get((name, "run"), lines[name,])
        raise ConfigError(f"{path}:{line}: {name!r} needs `run: ALGORITHM`")
    for key in spec:
        if key not in _YAML_KEYS:
            message = f"unknown key {key!r}{hint(str(key), _YAML_KEYS)}"
            raise ConfigError(places.prefix((str(key),)) + message)
    for key in ("config", "stop"):
        if not isinstance(spec.get(key) or {}, dict):
            raise ConfigError(f"{places.prefix((key,))}`{key}` must be a mapping")
    config = get_algorithm(spec["run"], places.prefix(("run",))).get_default_config()
    if spec.get("env") is not None:
        config.environment(_environment(spec["env"], places))
    apply_settings(config, spec.get("config") or {}, places)
    return Experiment(
        name=name,
        file=path,
        config=config,
        stop=dict(spec.get("stop") or {}),
        num_samples=_number(spec, "num_samples", 1, places) or 1,
        checkpoint_freq=_number(spec, "checkpoint_freq", 0, places),
        checkpoint_minutes=_number(spec, "checkpoint_minutes", 0, places, float),
        places=places,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _environment(env: Any, places: Places) -> Any:
    try:
        env = make_spaces(env)
    except BadSpace as error:
        raise ConfigError(places.prefix(("env", *error.path)) + str(error)) from error
    if not isinstance(env, str) and not is_space(env):
        raise ConfigError(f"{places.prefix(('env',))}`env` must be a name, not {env!r}")
    return env


def _number(
    spec: dict[str, Any], key: str, least: int, places: Places, kind: type = int
) -> Any | None:
    value = spec.get(key)
    wrong = isinstance(value, bool) or not isinstance(value, (int, kind))
    if value is not None and (wrong or not value >= least):
        whole = "whole " if kind is int else ""
        message = f"{key} must be a {whole}number of at least {least}, not {value!r}"
        raise ConfigError(places.prefix((key,)) + message)
    return value
