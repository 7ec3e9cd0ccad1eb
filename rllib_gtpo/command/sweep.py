"""More than one trial: grid searches and repeated samples, through `ray.tune.Tuner`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rllib_gtpo.command.directory import RunDirectory, RunRecord
from rllib_gtpo.command.files import Experiment
from rllib_gtpo.command.output import resume_command
from rllib_gtpo.command.ray_session import ray_session
from rllib_gtpo.command.stopping import StopCriteria
from rllib_gtpo.command.trial import FAILURE, OK, checkpoint_frequency
from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from rllib_gtpo.command.run import RunOptions


def is_sweep(experiment: Experiment) -> bool:
    """Whether the experiment is more than one trial."""
    from ray.tune.search.variant_generator import generate_variants

    if experiment.num_samples > 1:
        return True
    variants = generate_variants(experiment.config.to_dict())
    return any(resolved for resolved, _ in [next(variants)])


def run_sweep(
    experiment: Experiment,
    criteria: StopCriteria,
    record: RunRecord,
    options: RunOptions,
    resumed: RunDirectory | None,
) -> int:
    """Runs all trials; 0 if none failed.  A resumed sweep runs only what is unfinished."""
    from ray import tune

    from rllib_gtpo.command.run import run_path

    if not criteria:
        raise ConfigError("a sweep needs a stop criterion: add `stop` or --stop KEY=VALUE")
    if resumed is not None and resumed.record.kind != "sweep":
        raise ConfigError(f"{resumed.path} is a single run, but {experiment.file} asks for a sweep")
    record.kind = "sweep"
    run = resumed or RunDirectory.create(run_path(experiment, options), record, options.keep)
    run.record = record
    path = run.path.absolute()
    trainable: Any = experiment.config.algo_class
    with ray_session({}, options):
        if resumed is not None:
            tuner = tune.Tuner.restore(
                str(path / "tune"), trainable, param_space=experiment.config, resume_errored=True
            )
        else:
            tuner = _new_tuner(trainable, experiment, criteria, options, path)
        results = tuner.fit()
    run.record.status = "completed" if not results.errors else "interrupted"
    run.write_record()
    for error in results.errors:
        print(f"error: a trial failed: {error}", file=sys.stderr)
    for result in results:
        if result.checkpoint is not None:
            print(result.checkpoint.path)
    print(resume_command(run), flush=True)
    return FAILURE if results.errors else OK


def _new_tuner(
    trainable: Any, experiment: Experiment, criteria: StopCriteria, options: RunOptions, path: Path
) -> Any:
    from ray import tune

    frequency = checkpoint_frequency(options.checkpoint_freq, experiment.checkpoint_freq)
    return tune.Tuner(
        trainable,
        param_space=experiment.config,
        tune_config=tune.TuneConfig(num_samples=experiment.num_samples),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(path),
            stop={key.replace(".", "/"): value for key, value in criteria.thresholds.items()},
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=frequency,
                checkpoint_at_end=True,
                num_to_keep=max(1, options.keep),
            ),
            verbose=1,
        ),
    )
