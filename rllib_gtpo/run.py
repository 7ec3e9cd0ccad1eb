"""`rllib train file X`: one trial in this process, for any RLlib algorithm.

An algorithm may define these hooks; all are optional:
    on_run_start(), on_run_end()   called around the iterations, also of a resumed run
    request_stop()                 leave train() or a hook soon, by raising errors.Interrupted
    summary_line(result) -> str    the line printed for an iteration
    held_out_accuracy              (before, after) or None, printed at the end
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

from rllib_gtpo.errors import ConfigError, Interrupted
from rllib_gtpo.interrupts import PIPE_EXIT, Stopper
from rllib_gtpo.quiet import building, silence
from rllib_gtpo.ray_session import check_resources, ray_session
from rllib_gtpo.result_log import ITERATION, ResultLog
from rllib_gtpo.run_dir import Checkpoint, RunDirectory, RunRecord, SaveError, file_hash
from rllib_gtpo.run_files import Experiment, check_env, load_experiment
from rllib_gtpo.run_settings import apply_overrides, parse_stop
from rllib_gtpo.stopping import StopCriteria, numbers

OK, FAILURE, BAD_INPUT, NOT_SAVED = 0, 1, 2, 3


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

    from rllib_gtpo.sweep import is_sweep, run_sweep

    if is_sweep(experiment):
        return run_sweep(experiment, criteria, record, options, resumed[0] if resumed else None)
    if resumed is None:
        run, checkpoint = (
            RunDirectory.create(_run_path(experiment, options), record, options.keep),
            None,
        )
    else:
        run, checkpoint = resumed
        if checkpoint is None:
            raise ConfigError(f"{run.path} is a sweep, but {path} asks for a single run")
        run.record = record
        if record.status == "completed" and criteria.reached(checkpoint.progress["metrics"]):
            print(f"{run.path} is already complete")
            _print_end(run, checkpoint)
            return OK
    if not criteria:
        print("no stop criterion: training goes on until Ctrl-C")
    return _Trial(experiment, criteria, run, options).execute(checkpoint)


class _Trial:
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
        self.metrics: dict[str, float] = {}
        self.saved: Checkpoint | None = None
        self.dirty = False  # whether there is state that no checkpoint holds
        freq = options.checkpoint_freq
        self.freq = freq if freq is not None else experiment.checkpoint_freq or 10

    def execute(self, checkpoint: Checkpoint | None) -> int:
        """Runs to the end; prints the report only after Ray is down, so that nothing follows it."""
        needs = check_resources(self.experiment.config)
        with ray_session(needs, self.options), self.stopper:
            try:
                code = self._run(checkpoint)
            except KeyboardInterrupt:  # second signal: no clean-up that could hang
                print("stopped at once, without saving", file=sys.stderr)
                code = self.stopper.code or 130
            except Exception as error:
                if self.saved is not None and not isinstance(error, ConfigError):
                    print(f"last good checkpoint: {self.saved.path.absolute()}", file=sys.stderr)
                raise
            else:
                self._close()
        if self.saved is not None:
            if self.stopper.requested and code == self.stopper.code:
                self._say("interrupted; continue with the last line")
            _print_end(self.run, self.saved, complete=code == OK)
        return code

    def _run(self, checkpoint: Checkpoint | None) -> int:
        self._say(f"run directory: {self.run.path}")
        self._build(checkpoint)
        interrupted = not self._train()
        stopped = interrupted or self.stopper.requested
        if not self._save_final():
            return NOT_SAVED
        if not stopped:
            stopped = not self._call_hook("on_run_end")
        accuracy = getattr(self.algo, "held_out_accuracy", None)
        record = self.run.record
        record.held_out_accuracy = [float(x) for x in accuracy] if accuracy else None
        record.status = "interrupted" if stopped else "completed"
        self.run.write_record()
        return self.stopper.code or FAILURE if stopped else OK

    def _build(self, checkpoint: Checkpoint | None) -> None:
        with _logdir(self.run.path), nullcontext() if self.options.debug else building():
            self.algo = self.experiment.config.build_algo()
        iteration = 0
        if checkpoint is not None:
            for moved in self.run.clean(checkpoint):
                self._say(f"set aside a newer checkpoint: {moved}")
            self.algo.load_checkpoint(str(checkpoint.path.absolute()))
            progress = checkpoint.progress
            iteration = int(progress[ITERATION])
            self.algo._iteration = iteration
            self.algo._time_total = float(progress["time_total_s"])  # RLlib restores only the count
            self.metrics = progress["metrics"]
            self.saved = checkpoint
            self._say(f"resumed from {checkpoint.path} at iteration {iteration}")
        self.run.record.status = "running"
        self.run.write_record()
        self.log = ResultLog(self.run.path, iteration)
        self.log.write_params(self.experiment.config.to_dict())
        self.stopper.attach(self.algo)

    def _train(self) -> bool:
        """Iterates; False if something asked for a stop in the middle of a step."""
        if self.stopper.requested:
            return True
        self.dirty = self.saved is None
        if not self._call_hook("on_run_start"):
            return False
        while not self.stopper.requested:
            reason = self.criteria.reached(self.metrics) if self.metrics else None
            if reason:
                self._say(f"done: {reason}")
                return True
            self.dirty = True
            try:
                result = self.algo.train()
            except Interrupted:
                return False
            self.metrics = numbers(result)
            assert self.log is not None
            self.log.write(result)
            self._say(self._summary(result))
            self.criteria.check_known(self.metrics)
            if self._periodic():
                self._save_periodic()
        return True

    def _periodic(self) -> bool:
        done = self.stopper.requested or self.criteria.reached(self.metrics)
        return not done and self.freq > 0 and self.algo.iteration % self.freq == 0

    def _save(self) -> None:
        progress = {
            ITERATION: self.algo.iteration,
            "time_total_s": self.algo._time_total,
            "metrics": self.metrics,
        }
        self.saved = self.run.save(self.algo.iteration, progress, self.algo.save_checkpoint)
        self.dirty = False

    def _save_periodic(self) -> None:
        try:
            self._save()
        except SaveError as error:
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

    def _call_hook(self, name: str) -> bool:
        """False if a stop was asked for while the hook ran and it left early."""
        hook = getattr(self.algo, name, None)
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
        if self.log is not None:
            self.log.close()
        if self.algo is not None:
            self.algo.stop()

    def _say(self, line: str) -> None:
        """Prints a line; a reader that closed the pipe ends the run as a signal would."""
        try:
            if line:
                print(line, flush=True)
        except BrokenPipeError:
            mute_stdout()
            self.stopper.request(PIPE_EXIT)


def mute_stdout() -> None:
    """Sends standard output nowhere, after its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    )


def _continued_record(old: RunRecord, new: RunRecord, path: Path) -> RunRecord:
    """The old run's options followed by the new ones; refuses another file or algorithm."""
    if old.file != new.file and old.sha256 != new.sha256:
        raise ConfigError(f"{path} is a run of {old.file}, not of {new.file}")
    if old.algorithm != new.algorithm:
        raise ConfigError(f"{path} is a run of {old.algorithm}, not of {new.algorithm}")
    new.overrides = old.overrides + new.overrides
    new.stop = old.stop + new.stop
    new.status, new.kind, new.held_out_accuracy = old.status, old.kind, old.held_out_accuracy
    return new


def _run_path(experiment: Experiment, options: RunOptions) -> Path:
    if options.out is not None:
        return options.out
    base = Path("runs") / f"{experiment.name}_{time.strftime('%Y%m%d-%H%M%S')}"
    candidate, count = base, 1
    while candidate.exists():
        count += 1
        candidate = base.with_name(f"{base.name}-{count}")
    return candidate


def _print_end(run: RunDirectory, checkpoint: Checkpoint, complete: bool = True) -> None:
    """The last lines: accuracy if the algorithm measures one, checkpoint, how to continue."""
    try:
        if complete and run.record.held_out_accuracy:
            before, after = run.record.held_out_accuracy
            print(f"held-out accuracy {before:.2f} -> {after:.2f}")
        print(checkpoint.path.absolute())
        print(resume_command(run), flush=True)
    except BrokenPipeError:
        mute_stdout()


def resume_command(run: RunDirectory) -> str:
    """The command that continues `run` from the present directory."""
    return shlex.join(
        [
            "rllib",
            "train",
            "file",
            _relative(Path(run.record.file)),
            "--resume",
            _relative(run.path),
        ]
    )


def _relative(path: Path) -> str:
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _first(metrics: Mapping[str, float], *keys: str) -> float | None:
    return next((metrics[key] for key in keys if key in metrics), None)


@contextmanager
def _logdir(directory: Path) -> Iterator[None]:
    """Keeps RLlib from leaving an empty directory in ~/ray_results for each algorithm it builds."""
    from ray.tune.trainable import trainable

    scratch = directory.absolute() / ".ray"
    with mock.patch.object(trainable, "DEFAULT_STORAGE_PATH", str(scratch)):
        yield
    shutil.rmtree(scratch, ignore_errors=True)
