"""What a sweep does between Tune's steps: stop trials, tell people, save on Ctrl-C."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from ray.tune import Callback, Stopper
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.result import SHOULD_CHECKPOINT

from rllib_gtpo.command import interrupts
from rllib_gtpo.command.result_log import ITERATION
from rllib_gtpo.command.stopping import StopCriteria, numbers
from rllib_gtpo.command.tuning import Goal, show_settings, trial_number

STOPPED_BY = "stopped_by"  # in a trial's last result: the criterion that ended it
_LINE_EVERY_S = 10.0  # of one trial


class Thresholds(Stopper):  # type: ignore[misc]
    """The stop criteria of single runs, for each trial.

    A sweep that goes on gets back the object that Tune saved; the criteria that it takes are those
    of this process.
    """

    criteria: ClassVar[StopCriteria]

    def __init__(self) -> None:
        self._by_trial: dict[str, StopCriteria] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_by_trial": {}}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether a trial is done; ConfigError, which ends the sweep, for an unknown metric."""
        criteria = self._by_trial.setdefault(trial_id, copy.copy(self.criteria))
        metrics = numbers(result)
        criteria.check_known(metrics)
        reason = criteria.reached(metrics)
        if reason is not None:
            result[STOPPED_BY] = reason
        return reason is not None

    def stop_all(self) -> bool:
        """Never: each trial has its own end."""
        return False


class SweepProgress(Callback):  # type: ignore[misc]
    """A line for a trial's first result, now and then, and when it ends."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._best: dict[str, float] = {}
        self._told: dict[str, float] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See Callback."""
        name, value = trial.trial_id, numbers(result).get(self._goal.metric)
        if value is not None and (
            name not in self._best or self._goal.better(value, self._best[name])
        ):
            self._best[name] = value
        now = time.monotonic()
        if not result.get("done") and now - self._told.get(name, 0.0) < _LINE_EVERY_S:
            return
        self._told[name] = now
        parts = [f"iter {result[ITERATION]:3d}"]
        if value is not None:
            parts.append(f"{self._goal.metric} {value:.4g} (best {self._best[name]:.4g})")
        parts.append(f"{result['time_total_s']:.0f} s")
        if result.get("done"):
            parts.append(f"done: {result[STOPPED_BY]}" if STOPPED_BY in result else "stopped early")
        self._say(trial, "  ".join(parts))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback."""
        self._say(trial, "failed")

    def _say(self, trial: Any, text: str) -> None:
        print(
            f"trial {trial_number(trial)}  {show_settings(trial.evaluated_params)}  {text}",
            flush=True,
        )


class TimedCheckpoints(Callback):  # type: ignore[misc]
    """Saves each trial whose last checkpoint is older than `period_s`; 0: none for that reason."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._saved: dict[str, float] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback."""
        self._saved[trial.trial_id] = time.monotonic()

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """See Callback."""
        self._saved[trial.trial_id] = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See Callback."""
        if self._period_s and time.monotonic() - self._saved[trial.trial_id] >= self._period_s:
            result[SHOULD_CHECKPOINT] = True


class SaveAndStop(Callback):  # type: ignore[misc]
    """After a first Ctrl-C or SIGTERM, every running trial finishes its step and saves.

    Then the sweep ends, through the signal that Tune itself listens to.

    Args:
        stopper: Knows whether somebody asked for a stop.
        loggers: Callbacks that are told that the trials end; Tune does not, and W&B's would wait
            for it for half an hour.
    """

    def __init__(self, stopper: interrupts.Stopper, loggers: Sequence[Any]) -> None:
        self._stopper, self._loggers = stopper, loggers
        self._saved: set[str] = set()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See Callback."""
        if self._stopper.requested:
            result[SHOULD_CHECKPOINT] = True

    def on_checkpoint(
        self, iteration: int, trials: list[Any], trial: Any, checkpoint: Any, **info: Any
    ) -> None:
        """See Callback."""
        if self._stopper.requested:
            self._saved.add(trial.trial_id)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """See Callback."""
        if not self._stopper.requested or any(self._waits_for(trial) for trial in trials):
            return
        for trial in trials:
            if trial.status == TuneTrial.RUNNING:
                for logger in self._loggers:
                    logger.on_trial_complete(iteration=iteration, trials=trials, trial=trial)
        signal.raise_signal(signal.SIGUSR1)

    def _waits_for(self, trial: Any) -> bool:
        """Whether there is something of the trial's to save."""
        began = trial.status == TuneTrial.RUNNING and trial.has_reported_at_least_once
        return began and trial.trial_id not in self._saved
