"""Results of Tune's trials, in the files and under the names of single runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray.tune.logger import LoggerCallback

from rllib_gtpo.command.result_log import ITERATION, ResultLog
from rllib_gtpo.record.location import Location


class TrialLogs(LoggerCallback):  # type: ignore[misc]
    """A `ResultLog` for each trial: result.json, progress.csv and TensorBoard events.

    Tune's own loggers copy their files to the trial's directory every five minutes, and repeat rows
    after a restart; these are there at once, and count without gaps or repeats.

        tune.RunConfig(callbacks=[TrialLogs()])
    """

    def __init__(self) -> None:
        self._logs: dict[str, ResultLog] = {}

    def log_trial_start(self, trial: Any) -> None:
        """Opens the trial's files; one that starts again goes on from its checkpoint."""
        self._close(trial)
        trial.init_local_path()
        saved = trial.latest_checkpoint_result
        done = int(saved.metrics.get(ITERATION, 0)) if saved is not None else 0
        directory = _directory(trial)
        directory.mkdir(parents=True, exist_ok=True)
        home = Location(trial.storage.storage_filesystem, trial.path, trial.path)
        log = self._logs[trial.trial_id] = ResultLog(directory, done, home)
        log.write_params(trial.config)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Appends an iteration."""
        if trial.trial_id not in self._logs:
            self.log_trial_start(trial)
        self._logs[trial.trial_id].write(result)

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """Closes the trial's files."""
        self._close(trial)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """Closes those of trials that were interrupted."""
        for trial in trials:
            self._close(trial)

    def _close(self, trial: Any) -> None:
        log = self._logs.pop(trial.trial_id, None)
        if log is not None:
            log.close()


def _directory(trial: Any) -> Path:
    """Where Tune keeps the trial, if that is on this machine; else what Tune copies there."""
    storage = trial.storage.storage_filesystem
    return Path(trial.path if storage.type_name == "local" else trial.local_path)
