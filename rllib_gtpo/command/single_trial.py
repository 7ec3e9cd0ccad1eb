"""Tune's callbacks, such as those of W&B and MLflow, for a run that is one trial without Tune."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.train._internal.session import _TrainingResult
from ray.tune import Checkpoint
from ray.tune.experiment import Trial

from rllib_gtpo.command.directory import RunDirectory
from rllib_gtpo.errors import ConfigError


class SingleTrial(Trial):  # type: ignore[misc]
    """A run as callbacks see a trial: its directory is the run's, and so is its name."""

    def __init__(self, run: RunDirectory, config: Mapping[str, Any]) -> None:
        super().__init__(
            run.record.algorithm,
            config=dict(config),
            trial_id=run.record.trial_id,
            trial_name_creator=lambda _: run.path.absolute().name,
            stub=True,
        )
        self._directory = str(run.path.absolute())

    @property
    def local_path(self) -> str:
        """The run's directory."""
        return self._directory

    @property
    def path(self) -> str:
        """The run's directory."""
        return self._directory

    @property
    def experiment_dir_name(self) -> str:
        """The run's name; W&B takes it for the group."""
        return Path(self._directory).name


class TrialCallbacks:
    """Calls the callbacks of an experiment file as Tune would.

    One that raises before the training ends the run; later it is reported once and left out, for
    a tracking server that is away must not end a training.
    """

    def __init__(
        self, callbacks: Sequence[Any], run: RunDirectory, config: Mapping[str, Any]
    ) -> None:
        self._given = callbacks
        self._callbacks: list[Any] = []  # that have started
        self._trial = SingleTrial(run, config)

    def start(self, stop: Mapping[str, Any], resumed: bool) -> None:
        """Sets them up and tells that the trial starts.

        Raises:
            ConfigError: One of them cannot work.
        """
        self._trial.set_status(Trial.RUNNING)
        for callback in self._given:
            try:
                callback.setup(stop=dict(stop), num_samples=1, total_num_samples=1)
                callback.on_trial_start(**self._about())
                if resumed:
                    callback.on_trial_restore(**self._about())
            except Exception as error:
                name = type(callback).__name__
                raise ConfigError(f"the callback {name} cannot start: {error}") from error
            self._callbacks.append(callback)

    def result(self, result: Mapping[str, Any], done: bool) -> None:
        """After an iteration."""
        if not self._callbacks:
            return
        shown = {**result, "done": done, "trial_id": self._trial.trial_id}
        self._trial.update_last_result(shown)
        self._tell("on_trial_result", result=shown)

    def saved(self, checkpoint: Path, metrics: Mapping[str, float]) -> None:
        """After a checkpoint."""
        if not self._callbacks:
            return
        kept = Checkpoint.from_directory(str(checkpoint.absolute()))
        manager = self._trial.run_metadata.checkpoint_manager
        manager.register_checkpoint(_TrainingResult(kept, dict(metrics)))
        self._tell("on_trial_save")
        self._tell("on_checkpoint", checkpoint=kept)

    def end(self, failed: bool = False) -> None:
        """At the end, also of an interrupted run."""
        self._trial.set_status(Trial.ERROR if failed else Trial.TERMINATED)
        self._tell("on_trial_error" if failed else "on_trial_complete")
        for callback in self._callbacks:
            self._call(callback, "on_experiment_end", trials=[self._trial])
        self._callbacks = []

    def _tell(self, hook: str, **more: Any) -> None:
        for callback in list(self._callbacks):
            self._call(callback, hook, **self._about(), **more)

    def _call(self, callback: Any, hook: str, **arguments: Any) -> None:
        try:
            getattr(callback, hook)(**arguments)
        except Exception as error:
            name = type(callback).__name__
            print(f"warning: {name}.{hook} failed and is left out: {error}", file=sys.stderr)
            self._callbacks = [other for other in self._callbacks if other is not callback]

    def _about(self) -> dict[str, Any]:
        iteration = int(self._trial.last_result.get("training_iteration", 0))
        return {"iteration": iteration, "trials": [self._trial], "trial": self._trial}
