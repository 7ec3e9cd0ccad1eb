"""`rllib train file X`: from a file and options to a run, new or continued."""

from __future__ import annotations

import platform
import time
import uuid
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from rllib_gtpo.command.directory import RunDirectory, RunRecord, file_hash
from rllib_gtpo.command.files import Experiment, check_env, load_experiment
from rllib_gtpo.command.output import print_end
from rllib_gtpo.command.quiet import silence
from rllib_gtpo.command.settings import apply_overrides, parse_stop
from rllib_gtpo.command.stopping import StopCriteria
from rllib_gtpo.command.trial import OK, Trial
from rllib_gtpo.errors import ConfigError


@dataclass
class RunOptions:
    """The options of `rllib train file`."""

    stop: list[str] = field(default_factory=list)
    override: list[str] = field(default_factory=list)
    resume: Path | None = None
    checkpoint_freq: int | None = None
    keep: int = 2
    out: Path | None = None
    num_cpus: int | None = None
    ray_address: str | None = None
    debug: bool = False


def train_file(path: Path, options: RunOptions) -> int:
    """Trains what `path` describes; returns the exit code.

    Raises:
        ConfigError: Something in the file or the options is wrong; nothing was trained.
    """
    if not options.debug:
        silence()
    resumed = RunDirectory.open(options.resume, options.keep) if options.resume else None
    experiment = load_experiment(path)
    record = _record(experiment, options)
    if resumed:
        record = _continued_record(resumed[0].record, record, resumed[0].path)
    apply_overrides(experiment.config, record.overrides)
    check_env(experiment.config, f"{path}: ")
    stop = {**experiment.stop, **parse_stop(record.stop)}
    criteria = StopCriteria(stop, experiment.config.evaluation_interval)

    from rllib_gtpo.command.sweep import is_sweep, run_sweep

    if is_sweep(experiment):
        return run_sweep(experiment, criteria, record, options, resumed[0] if resumed else None)
    if resumed is None:
        run, checkpoint = (
            RunDirectory.create(run_path(experiment, options), record, options.keep),
            None,
        )
    else:
        run, checkpoint = resumed
        if checkpoint is None:
            raise ConfigError(f"{run.path} is a sweep, but {path} asks for a single run")
        run.record = record
        if record.status == "completed" and criteria.reached(checkpoint.progress["metrics"]):
            print(f"{run.path} is already complete")
            print_end(run, checkpoint)
            return OK
    if not criteria:
        print("no stop criterion: training goes on until Ctrl-C")
    return Trial(experiment, criteria, run, options).execute(checkpoint)


def _record(experiment: Experiment, options: RunOptions) -> RunRecord:
    versions = {"python": platform.python_version()}
    for package in ("rllib-gtpo", "ray", "torch", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return RunRecord(
        file=str(experiment.file.resolve()),
        sha256=file_hash(experiment.file),
        name=experiment.name,
        algorithm=experiment.algorithm,
        overrides=list(options.override),
        stop=list(options.stop),
        versions=versions,
        trial_id=uuid.uuid4().hex[:8],
    )


def _continued_record(old: RunRecord, new: RunRecord, path: Path) -> RunRecord:
    """The old run's options followed by the new ones; refuses another file or algorithm."""
    if old.file != new.file and old.sha256 != new.sha256:
        raise ConfigError(f"{path} is a run of {old.file}, not of {new.file}")
    if old.algorithm != new.algorithm:
        raise ConfigError(f"{path} is a run of {old.algorithm}, not of {new.algorithm}")
    new.overrides = old.overrides + new.overrides
    new.stop = old.stop + new.stop
    new.trial_id = old.trial_id or new.trial_id
    new.status, new.kind, new.held_out_accuracy = old.status, old.kind, old.held_out_accuracy
    return new


def run_path(experiment: Experiment, options: RunOptions) -> Path:
    """Where a new run goes."""
    if options.out is not None:
        return options.out
    base = Path("runs") / f"{experiment.name}_{time.strftime('%Y%m%d-%H%M%S')}"
    candidate, count = base, 1
    while candidate.exists():
        count += 1
        candidate = base.with_name(f"{base.name}-{count}")
    return candidate
