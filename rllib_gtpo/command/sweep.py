"""More than one trial: grid searches and repeated samples, through `ray.tune.Tuner`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from rllib_gtpo.command.directory import RunDirectory, RunRecord
from rllib_gtpo.command.files import Experiment
from rllib_gtpo.command.interrupts import Stopper
from rllib_gtpo.command.output import keep_colour_codes_away, resume_command
from rllib_gtpo.command.ray_session import ray_session
from rllib_gtpo.command.stopping import StopCriteria
from rllib_gtpo.command.trial import FAILURE, OK, checkpoint_frequency, checkpoint_period_s
from rllib_gtpo.command.tuning import (
    Goal,
    goal_of,
    varied_variants,
    with_goal,
)
from rllib_gtpo.errors import ConfigError

if TYPE_CHECKING:
    from rllib_gtpo.command.run import RunOptions

_TUNE_DIRECTORY = "tune"
_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a relative path means the same as in a single run
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # there is TrialLogs
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # there is SaveAndStop
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # an evaluation's metrics come now and then
}
_QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # there is SweepProgress; the newer output is never silent
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # the summary names them
}


def is_sweep(experiment: Experiment) -> bool:
    """Whether the experiment is more than one trial.

    Raises:
        ConfigError: It is not, and has a `tune_config`.
    """
    if experiment.num_samples != 1:
        return True
    ((varied, _),) = varied_variants(experiment.config, 1)
    if not varied and experiment.tune_config is not None:
        raise ConfigError(
            f"{experiment.file}: `tune_config` has no effect on a single trial: vary a setting, "
            "as in training(lr=tune.grid_search([1e-4, 1e-3])), set num_samples, or leave it out"
        )
    return bool(varied)


def run_sweep(
    experiment: Experiment,
    criteria: StopCriteria,
    record: RunRecord,
    options: RunOptions,
    resumed: RunDirectory | None,
    needs: dict[str, float],
) -> int:
    """Runs all trials, each of which `needs` some of what Ray has; 0 if none failed.

    A resumed sweep runs only what is unfinished.
    """
    from rllib_gtpo.command.run import run_path
    from rllib_gtpo.report.sweep import summarise

    if not criteria:
        raise ConfigError("a sweep needs a stop criterion: add `stop` or --stop KEY=VALUE")
    if resumed is not None and resumed.record.kind != "sweep":
        raise ConfigError(f"{resumed.path} is a single run, but {experiment.file} asks for a sweep")
    if resumed is not None and options.override:
        raise ConfigError(
            "a sweep goes on with the settings that it was started with: leave out --override, or "
            "start another"
        )
    goal = goal_of(experiment.config, experiment.tune_config)
    record.kind, record.metric, record.mode = "sweep", goal.metric, goal.mode
    run = resumed or RunDirectory.create(run_path(experiment, options), record, options.keep)
    run.record = record
    stopper = Stopper()
    with ray_session(needs, options), _tune_environment(options.debug), stopper:
        tuner = _tuner(experiment, criteria, options, run, goal, stopper)
        at_once = getattr(experiment.tune_config, "max_concurrent_trials", None)
        print(f"run directory: {run.path}\n{_sharing(needs, at_once)}", flush=True)
        tuner.fit()
    summary = summarise(run.path)
    complete = all(trial.complete for trial in summary.trials)
    run.record.status = "completed" if complete else "interrupted"
    run.write_record()
    keep_colour_codes_away()
    summary.show()
    print(resume_command(run), flush=True)
    return stopper.code or (OK if complete else FAILURE)


def _sharing(needs: Mapping[str, float], limit: int | None) -> str:
    """How many trials run at once."""
    import ray

    have = ray.cluster_resources()
    taken = {name: amount for name, amount in needs.items() if amount}
    at_once = min([int(have.get(n, 0.0) / amount + 1e-9) for n, amount in taken.items()] or [1])
    at_once = min(at_once, limit or at_once)
    each = ", ".join(f"{amount:g} {name}" for name, amount in taken.items())
    return f"each trial takes {each}: {at_once} at a time"


def _tuner(
    experiment: Experiment,
    criteria: StopCriteria,
    options: RunOptions,
    run: RunDirectory,
    goal: Goal,
    stopper: Stopper,
) -> Any:
    from ray import tune

    from rllib_gtpo.command.sweep_callbacks import (
        SaveAndStop,
        SweepProgress,
        Thresholds,
        TimedCheckpoints,
    )
    from rllib_gtpo.command.trial_logs import TrialLogs

    trainable: Any = experiment.config.algo_class
    path = run.path.absolute()
    if hasattr(experiment.config, "progress"):
        experiment.config.progress = False  # the bars of several trials would mix
    Thresholds.criteria = criteria
    loggers = [*experiment.callbacks, TrialLogs()]
    run_config = tune.RunConfig(
        name=_TUNE_DIRECTORY,
        storage_path=str(path),
        stop=Thresholds(),
        failure_config=tune.FailureConfig(max_failures=options.max_failures),
        checkpoint_config=tune.CheckpointConfig(
            checkpoint_frequency=checkpoint_frequency(
                options.checkpoint_freq, experiment.checkpoint_freq
            ),
            checkpoint_at_end=True,
            num_to_keep=max(1, options.keep),
        ),
        callbacks=[
            *loggers,
            SweepProgress(goal),
            TimedCheckpoints(checkpoint_period_s(options.checkpoint_minutes, experiment)),
            SaveAndStop(stopper, loggers),
        ],
        verbose=2 if options.debug else 0,
    )
    if not (path / _TUNE_DIRECTORY / "tuner.pkl").exists():
        return tune.Tuner(
            trainable,
            param_space=experiment.config,
            tune_config=with_goal(experiment.tune_config, experiment.num_samples, goal),
            run_config=run_config,
        )
    try:
        tuner = tune.Tuner.restore(
            str(path / _TUNE_DIRECTORY),
            trainable,
            param_space=experiment.config,
            resume_errored=True,
        )
    except ValueError as error:
        raise ConfigError(
            f"{run.path} cannot be continued with {experiment.file}: {error}"
        ) from error
    # Tune would go on with pickled copies of the old ones.
    restored = tuner._local_tuner._run_config
    restored.callbacks, restored.verbose = run_config.callbacks, run_config.verbose
    restored.failure_config = run_config.failure_config
    return tuner


@contextmanager
def _tune_environment(debug: bool) -> Iterator[None]:
    """Around a sweep: Tune's environment variables, and its messages away unless `debug`."""
    logger = logging.getLogger("ray.tune")
    level = logger.level
    with mock.patch.dict(os.environ, _ENVIRONMENT if debug else {**_ENVIRONMENT, **_QUIET}):
        if not debug:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)
