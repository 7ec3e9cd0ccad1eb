"""One trial in this process: build or restore, train, save, report.

An algorithm may define these hooks; all are optional:
    on_run_start() -> bool         called before the iterations, also of a resumed run; whether
                                   it did work that should be saved
    run_directory                  set to the directory before anything else
    on_run_end()                   called after the last iteration, unless interrupted
    request_stop()                 leave train() or a hook soon, by raising errors.Interrupted
    pause_every_s                  set to the seconds after which on_run_start should raise
                                   errors.Interrupted to be saved; it is called again then
    summary_line(result) -> str    the line printed for an iteration
    held_out_accuracy              (before, after) or None, printed at the end
"""

from __future__ import annotations

import gc
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from rllib_gtpo.command.directory import Checkpoint, RunDirectory, SaveError
from rllib_gtpo.command.failures import is_bad_input, tell
from rllib_gtpo.command.files import Experiment
from rllib_gtpo.command.interrupts import PIPE_EXIT, Stopper
from rllib_gtpo.command.locks import one_trainer
from rllib_gtpo.command.output import print_end
from rllib_gtpo.command.quiet import building
from rllib_gtpo.command.ray_session import check_resources, ray_session
from rllib_gtpo.command.reading import reading
from rllib_gtpo.command.result_log import ITERATION, ResultLog
from rllib_gtpo.command.single_trial import TrialCallbacks
from rllib_gtpo.command.stopping import StopCriteria, numbers
from rllib_gtpo.command.streams import mute_stdout
from rllib_gtpo.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from rllib_gtpo.command.run import RunOptions

OK, FAILURE, BAD_INPUT, NOT_SAVED = 0, 1, 2, 3


class Trial:
    """One run of one algorithm: build or restore, train, save, report."""

    def __init__(
        self, experiment: Experiment, criteria: StopCriteria, run: RunDirectory, options: RunOptions
    ) -> None:
        self.experiment = experiment
        self.criteria = criteria
        self.run = run
        self.options = options
        self.stopper = Stopper()
        self.algo: Any = None
        self.log: ResultLog | None = None
        self.callbacks: TrialCallbacks | None = None  # of Tune
        self.metrics: dict[str, float] = {}
        self.saved: Checkpoint | None = None
        self.dirty = False  # whether there is state that no checkpoint holds
        self.freq = checkpoint_frequency(options.checkpoint_freq, experiment.checkpoint_freq)
        self.period_s = checkpoint_period_s(options.checkpoint_minutes, experiment)
        self.save_tried = time.monotonic()
        self.failed_saves = 0
        self.failures_left = options.max_failures

    def execute(self, checkpoint: Checkpoint | None) -> int:
        """Runs to the end; prints the report only after Ray is down, so that nothing follows it."""
        needs = check_resources(self.experiment.config)
        with one_trainer(self.run.path):
            self._say(f"run directory: {self.run.path}")
            while (code := self._attempt(needs, checkpoint)) is None:
                checkpoint = self.saved
        if self.saved is not None:
            if self.stopper.requested and code == self.stopper.code:
                self._say("interrupted; continue with the last line")
            print_end(self.run, self.saved, complete=code == OK)
        return code

    def _attempt(self, needs: Mapping[str, float], checkpoint: Checkpoint | None) -> int | None:
        """The exit code; None after a failure, if the run is to begin again where it was saved.

        It begins with another session of Ray, so that nothing of what failed is left.
        """
        try:
            with ray_session(needs, self.options), self.stopper:  # Ray sets a handler of its own
                code = self._run(checkpoint)
                self._close()
                return code
        except KeyboardInterrupt:  # second signal: no clean-up that could hang
            print("stopped at once, without saving", file=sys.stderr)
            return self.stopper.code or 130
        except Exception as error:
            if self.callbacks is not None:
                self.callbacks.end(failed=True)
            final = not self.failures_left or is_bad_input(error) or self.stopper.requested
            if final:
                if self.saved is not None and not isinstance(error, ConfigError):
                    print(f"last good checkpoint: {self.saved.path.absolute()}", file=sys.stderr)
                raise
            self._count(error)
        self._give_up_algorithm()
        return None

    def _count(self, error: Exception) -> None:
        self.failures_left -= 1
        self.run.record.failures += 1
        tell(error, "warning", self.options.debug)
        place = f"from {self.saved.path.name}" if self.saved else "from the start"
        left = self.failures_left
        print(f"starting again {place}; failures that may follow: {left}", file=sys.stderr)

    def _give_up_algorithm(self) -> None:
        """Frees what an algorithm holds that failed; it may not be able to do so itself."""
        try:
            self._close()
        except Exception as error:
            print(f"warning: what failed did not stop cleanly: {error!r}", file=sys.stderr)
        self.algo = self.log = self.callbacks = None
        gc.collect()

    def _run(self, checkpoint: Checkpoint | None) -> int:
        self._build(checkpoint)
        interrupted = not self._train()
        stopped = interrupted or self.stopper.requested
        if not self._save_final():
            return NOT_SAVED
        if not stopped:
            stopped = not self._end()
        accuracy = getattr(self.algo, "held_out_accuracy", None)
        record = self.run.record
        record.held_out_accuracy = [float(x) for x in accuracy] if accuracy else None
        self._write_status("interrupted" if stopped else "completed")
        return self.stopper.code or FAILURE if stopped else OK

    def _build(self, checkpoint: Checkpoint | None) -> None:
        with logdir_in(self.run.path), nullcontext() if self.options.debug else building():
            self.algo = self.experiment.config.build_algo()
        if hasattr(self.algo, "run_directory"):
            self.algo.run_directory = str(self.run.path.absolute())
        if hasattr(self.algo, "pause_every_s"):
            self.algo.pause_every_s = self.period_s
        iteration, self.metrics = 0, {}
        if checkpoint is not None:
            for moved in self.run.clean(checkpoint):
                self._say(f"set aside a newer checkpoint: {moved}")
            progress = checkpoint.progress
            with reading(checkpoint.path):
                self.algo.load_checkpoint(str(checkpoint.path.absolute()))
            iteration = int(progress[ITERATION])
            self.algo._iteration = iteration
            self.algo._time_total = float(progress["time_total_s"])  # RLlib restores only the count
            self.metrics = progress["metrics"]
            self.saved = checkpoint
            self._say(f"resumed from {checkpoint.path} at iteration {iteration}")
        self._write_status("running")
        self.log = ResultLog(self.run.path, iteration)
        settings = self.experiment.config.to_dict()
        self.log.write_params(settings)
        self.callbacks = TrialCallbacks(self.experiment.callbacks, self.run, settings)
        with nullcontext() if self.options.debug else building():  # W&B starts an actor
            self.callbacks.start(self.criteria.thresholds, resumed=checkpoint is not None)
        self.stopper.attach(self.algo)

    def _train(self) -> bool:
        """Iterates; False if something asked for a stop in the middle of a step."""
        if self.stopper.requested:
            return True
        self.dirty = self.saved is None
        if not self._start():
            return False
        while not self.stopper.requested:
            reason = self.criteria.reached(self.metrics) if self.metrics else None
            if reason:
                self._say(f"done: {reason}")
                return True
            was_dirty, self.dirty = self.dirty, True
            try:
                result = self.algo.train()
            except Interrupted as stop:
                self.dirty = was_dirty or stop.changed
                return False
            counts = {"failures": self.run.record.failures, "failed_saves": self.failed_saves}
            result["run"] = counts
            self.metrics = numbers(result)
            assert self.log is not None and self.callbacks is not None
            self.log.write(result)
            self.callbacks.result(result, done=self.criteria.reached(self.metrics) is not None)
            self._say(self._summary(result))
            if not self.stopper.requested:  # which leaves out an evaluation
                self.criteria.check_known(self.metrics)
            if self._periodic():
                self._save_periodic()
        return True

    def _start(self) -> bool:
        """Calls on_run_start until it is through; False if a stop was asked for meanwhile."""
        hook = getattr(self.algo, "on_run_start", None)
        while callable(hook):
            was_dirty, self.dirty = self.dirty, True  # it may leave in the middle of its work
            try:
                worked = hook()
            except Interrupted as stop:
                self.dirty = was_dirty or stop.changed
                if self.stopper.requested or not self.period_s:
                    return False
                self._save_periodic()
                continue
            self.dirty = bool(worked) or was_dirty
            if worked and (self.freq > 0 or self.period_s):
                self._save_periodic()
            break
        return True

    def _periodic(self) -> bool:
        done = self.stopper.requested or self.criteria.reached(self.metrics)
        by_count = self.freq > 0 and self.algo.iteration % self.freq == 0
        by_time = self.period_s and time.monotonic() - self.save_tried >= self.period_s
        return not done and bool(by_count or by_time)

    def _save(self) -> None:
        progress = {
            ITERATION: self.algo.iteration,
            "time_total_s": self.algo._time_total,
            "metrics": self.metrics,
        }
        self.save_tried = time.monotonic()
        self.saved = self.run.save(self.algo.iteration, progress, self.algo.save_checkpoint)
        if self.callbacks is not None:
            self.callbacks.saved(self.saved.path, self.metrics)
        self.dirty = False

    def _save_periodic(self) -> None:
        try:
            self._save()
        except SaveError as error:
            self.failed_saves += 1
            again = "training goes on; the next attempt is at the next checkpoint"
            print(f"warning: {error}; {again}", file=sys.stderr)

    def _save_final(self) -> bool:
        if not self.dirty:
            return True
        try:
            self._save()
        except SaveError as error:
            last = self.saved.path.absolute() if self.saved else "none"
            print(f"error: {error}\nlast good checkpoint: {last}", file=sys.stderr)
            return False
        return True

    def _write_status(self, status: str) -> None:
        self.run.record.status = status
        try:
            self.run.write_record()
        except OSError as error:
            print(f"warning: run.json is not up to date: {error}", file=sys.stderr)

    def _end(self) -> bool:
        """Calls on_run_end; False if a stop was asked for meanwhile and it left early."""
        hook = getattr(self.algo, "on_run_end", None)
        try:
            if callable(hook):
                hook()
        except Interrupted:
            return False
        return True

    def _summary(self, result: Mapping[str, Any]) -> str:
        summary_line = getattr(self.algo, "summary_line", None)
        if callable(summary_line):
            return str(summary_line(result))
        mean = _first(self.metrics, "env_runners/episode_return_mean", "episode_reward_mean")
        steps = _first(
            self.metrics,
            "env_runners/num_env_steps_sampled_lifetime",
            "num_env_steps_sampled_lifetime",
            "num_env_steps_sampled",
        )
        return (
            f"iteration {self.algo.iteration}"
            f"  episode_return_mean {'-' if mean is None else f'{mean:.2f}'}"
            f"  env steps {'-' if steps is None else f'{steps:.0f}'}"
            f"  {self.metrics.get('time_total_s', 0.0):.1f} s"
        )

    def _close(self) -> None:
        if self.algo is not None:
            self.algo.stop()  # completes the record, which the log shows
        if self.log is not None:
            self.log.close()
        if self.callbacks is not None:
            self.callbacks.end()

    def _say(self, line: str) -> None:
        """Prints a line; a reader that closed the pipe ends the run as a signal would."""
        try:
            if line:
                print(line, flush=True)
        except BrokenPipeError:
            mute_stdout()
            self.stopper.request(PIPE_EXIT)


def checkpoint_frequency(option: int | None, of_file: int | None) -> int:
    """Iterations between checkpoints: the option, the file, or 10; 0 means only at the end."""
    if option is not None:
        return option
    return 10 if of_file is None else of_file


def checkpoint_period_s(option: float | None, experiment: Experiment) -> float:
    """Most seconds between checkpoints: by the option or the file; 0: however long it takes."""
    minutes = experiment.checkpoint_minutes if option is None else option
    return 60.0 * (minutes or 0.0)


def _first(metrics: Mapping[str, float], *keys: str) -> float | None:
    return next((metrics[key] for key in keys if key in metrics), None)


@contextmanager
def logdir_in(directory: Path) -> Iterator[None]:
    """Keeps RLlib from leaving an empty directory in ~/ray_results for each algorithm it builds."""
    from ray.tune.trainable import trainable

    scratch = directory.absolute() / ".ray"
    with mock.patch.object(trainable, "DEFAULT_STORAGE_PATH", str(scratch)):
        yield
    shutil.rmtree(scratch, ignore_errors=True)
