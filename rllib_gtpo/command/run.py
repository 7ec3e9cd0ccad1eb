"""`rllib train`: from a file or names, and options, to a run, new or continued."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from rllib_gtpo.command.directory import RunDirectory
from rllib_gtpo.command.dry_run import print_resolved
from rllib_gtpo.command.files import Experiment
from rllib_gtpo.command.output import print_end
from rllib_gtpo.command.quiet import silence
from rllib_gtpo.command.resolve import Named, resolve
from rllib_gtpo.command.trial import OK, Trial
from rllib_gtpo.errors import ConfigError


@dataclass
class RunOptions:
    """The options of `rllib train`."""

    stop: list[str] = field(default_factory=list)
    config: list[str] = field(default_factory=list)  # like `override`, and before it
    override: list[str] = field(default_factory=list)
    resume: Path | None = None
    checkpoint_freq: int | None = None
    checkpoint_minutes: float | None = None
    max_failures: int = 0
    keep: int = 2
    out: Path | None = None
    num_cpus: int | None = None
    num_gpus: int | None = None
    ray_address: str | None = None
    debug: bool = False
    dry_run: bool = False
    show_all: bool = False


def train(source: Path | Named, options: RunOptions) -> int:
    """Trains what a file, or names, describe; returns the exit code.

    Raises:
        ConfigError: Something in the file or the options is wrong; nothing was trained.
    """
    if not options.debug:
        silence()
    resolved = resolve(source, options)
    if options.dry_run:
        return print_resolved(resolved, options)
    experiment, criteria = resolved.experiment, resolved.criteria
    if resolved.is_sweep:
        from rllib_gtpo.command.sweep import run_sweep

        return run_sweep(
            experiment, criteria, resolved.record, options, resolved.resumed, resolved.needs
        )
    run, checkpoint = resolved.resumed, resolved.checkpoint
    if run is None:
        run = RunDirectory.create(run_path(experiment, options), resolved.record, options.keep)
    elif checkpoint is None:
        raise ConfigError(f"{run.path} is a sweep, but {source} asks for a single run")
    else:
        run.record = resolved.record
        if run.record.status == "completed" and criteria.reached(checkpoint.progress["metrics"]):
            print(f"{run.path} is already complete")
            print_end(run, checkpoint)
            return OK
    if not criteria:
        print("no stop criterion: training goes on until Ctrl-C")
    return Trial(experiment, criteria, run, options).execute(checkpoint)


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
