"""What a command line means before anything starts: experiment, criteria, where each came from."""

from __future__ import annotations

import platform
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rllib_gtpo.command.directory import Checkpoint, RunDirectory, RunRecord, file_hash
from rllib_gtpo.command.files import Experiment, check_env, load_experiment, named_experiment
from rllib_gtpo.command.ray_session import check_resources
from rllib_gtpo.command.reading import installed_versions, other_versions
from rllib_gtpo.command.search_spaces import spaces_of
from rllib_gtpo.command.settings import CONFIG, apply_overrides, attribute_of
from rllib_gtpo.command.stopping import StopCriteria
from rllib_gtpo.command.sweep import is_sweep
from rllib_gtpo.command.tuning import show_settings, varied_variants
from rllib_gtpo.command.yaml_text import parse_assignment
from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from rllib_gtpo.command.run import RunOptions

_CHECKED_VARIANTS = 256


@dataclass(frozen=True)
class Named:
    """An experiment without a file: `--algo` and `--env`."""

    algorithm: str
    env: str | None = None

    def __str__(self) -> str:
        return " ".join(self.words)

    @property
    def words(self) -> list[str]:
        """The options that say it."""
        return ["--algo", self.algorithm, *(["--env", self.env] if self.env else [])]


@dataclass
class Resolved:
    """Everything that a run needs, checked; nothing has been started or written."""

    experiment: Experiment
    criteria: StopCriteria
    record: RunRecord
    needs: dict[str, float]  # of one trial
    is_sweep: bool
    resumed: RunDirectory | None = None
    checkpoint: Checkpoint | None = None


def resolve(source: Path | Named, options: RunOptions) -> Resolved:
    """Reads files and options, in this order: defaults, file, a resumed run's options, options.

    Raises:
        ConfigError: Something in them is wrong, with its place.
    """
    run, checkpoint = None, None
    if options.resume:
        run, checkpoint = RunDirectory.open(options.resume, options.keep)
    if isinstance(source, Named):
        experiment = named_experiment(source.algorithm, source.env)
    else:
        experiment = load_experiment(source)
    record = _record(experiment, source, options)
    earlier: tuple[str, list[str], list[str]] = ("", [], [])
    if run is not None:
        earlier = (f"{options.resume}: ", run.record.overrides, run.record.stop)
        changed = other_versions(run.record.versions)
        if changed:
            print(f"note: {run.path} was last trained with {changed}", file=sys.stderr)
        record = _continued_record(run.record, record, run.path)
    places, stop = experiment.places, experiment.stop
    apply_overrides(experiment.config, options.config, places, "--config")
    for prefix, overrides, stops in (earlier, ("", options.override, options.stop)):
        apply_overrides(experiment.config, overrides, places, f"{prefix}--override")
        for text in stops:
            key, value = parse_assignment(text, f"{prefix}--stop")
            stop[key] = value
            places.set_value(("stop", key), value, f"{prefix}--stop {text}")
    try:
        criteria = StopCriteria(stop, _evaluation_interval(experiment))
    except ConfigError as error:
        raise ConfigError(places.prefix_of(str(error), ("stop",)) + str(error)) from error
    needs = check(experiment)
    return Resolved(experiment, criteria, record, needs, is_sweep(experiment), run, checkpoint)


def check(experiment: Experiment) -> dict[str, float]:
    """Validates a config, or those that a sweep would try; what one trial needs.

    Raises:
        ConfigError: A setting is impossible, with its place.
    """
    if not spaces_of(experiment.config):
        return _check_config(experiment, experiment.config)
    needs: dict[str, float] = {}
    for varied, settings in varied_variants(experiment.config, _CHECKED_VARIANTS):
        variant = experiment.config.copy(copy_frozen=False).update_from_dict(settings)
        trial = f"trial {show_settings(varied)}: "
        for name, amount in _check_config(experiment, variant, trial).items():
            needs[name] = max(amount, needs.get(name, 0.0))
    return needs


def _check_config(experiment: Experiment, config: Any, trial: str = "") -> dict[str, float]:
    places = experiment.places
    env_path = (*CONFIG, "env") if (*CONFIG, "env") in places else ("env",)
    check_env(config, places.prefix(env_path))
    try:
        return check_resources(config)
    except ConfigError as error:
        named = places.prefix_of(str(error), CONFIG)
        if named == places.prefix(()):  # it names no setting
            named = places.prefix(_culprit(experiment, config))
        raise ConfigError(named + trial + str(error)) from error


def _culprit(experiment: Experiment, config: Any) -> tuple[str, ...]:
    """The setting without which a config is valid."""
    defaults = type(config)()
    for path in experiment.places:
        if path[:1] != CONFIG or len(path) != 2:
            continue
        attribute, trial = attribute_of(config, path[1]), config.copy(copy_frozen=False)
        try:
            setattr(trial, attribute, getattr(defaults, attribute, None))
            check_resources(trial)
        except (ConfigError, AttributeError):
            continue
        return path
    return ()


def _evaluation_interval(experiment: Experiment) -> int:
    interval = experiment.config.evaluation_interval
    return interval if isinstance(interval, int) else 0


def _record(experiment: Experiment, source: Path | Named, options: RunOptions) -> RunRecord:
    return RunRecord(
        file=str(source.resolve()) if isinstance(source, Path) else "",
        sha256=file_hash(source) if isinstance(source, Path) else "",
        name=experiment.name,
        algorithm=experiment.algorithm,
        overrides=[*options.config, *options.override],
        stop=list(options.stop),
        versions={"python": platform.python_version(), **installed_versions()},
        trial_id=uuid.uuid4().hex[:8],
        source=source.words if isinstance(source, Named) else [],
    )


def _continued_record(old: RunRecord, new: RunRecord, path: Path) -> RunRecord:
    """The old run's options followed by the new ones; refuses another file or algorithm."""
    if old.source != new.source or (old.file != new.file and old.sha256 != new.sha256):
        names = [" ".join(record.source) or record.file for record in (old, new)]
        raise ConfigError(f"{path} is a run of {names[0]}, not of {names[1]}")
    if old.algorithm != new.algorithm:
        raise ConfigError(f"{path} is a run of {old.algorithm}, not of {new.algorithm}")
    new.overrides = old.overrides + new.overrides
    new.stop = old.stop + new.stop
    new.trial_id = old.trial_id or new.trial_id
    new.status, new.kind, new.held_out_accuracy = old.status, old.kind, old.held_out_accuracy
    new.failures = old.failures
    return new
