"""What recording every rollout costs, as a share of the CPU time of training iterations.

How: two runs of one seed take turns, iteration by iteration, in this process: one records
everything, the other nothing.  Model and task are the quickstart's after a short cold start: 0.3 M
parameters, so that an iteration is cheap and the share as large as it gets.  `recording_share` is
the CPU time of the recorder's two threads over that of the recording run's iterations; `ratio` is
the median over pairs of equal iterations, with the noise of the machine.  `tensorboard_share` is
what writing the events of those iterations takes, of all threads, when it is done again by itself:
metrics, and histograms, transcripts and the other estimators from the whole record.

What there is before the first timed iteration is taken from the garbage collector: one look at all
of it takes as long as recording 15 iterations, and falls on whichever code allocates just then.

    python release/record_cost.py --json release/results/record_cost.json
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1] / "envs"))
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import ray
from results import Report

from rllib_gtpo import GTPOConfig
from rllib_gtpo.command.stopping import numbers
from rllib_gtpo.record.location import Location
from rllib_gtpo.record.recorder import Recorder
from rllib_gtpo.report.tensorboard import TensorBoardLog
from rllib_gtpo_envs import Calculator

THRESHOLDS = {"recording_share": {"max": 0.03}, "tensorboard_share": {"max": 0.01}}
SEED = 0


class TimedRecorder(Recorder):
    """Adds up the CPU time of both of its threads."""

    seconds = 0.0

    def record(self, *args, **kwargs):
        began = time.thread_time()
        try:
            return super().record(*args, **kwargs)
        finally:
            self.seconds += time.thread_time() - began

    def _write(self, *args):
        began = time.thread_time()
        try:
            super()._write(*args)
        finally:
            self.seconds += time.thread_time() - began


def build(record, directory, steps):
    """A run of the quickstart's task, ready for its first iteration."""
    algorithm = (
        GTPOConfig()
        .environment(Calculator)
        .language_model(
            call_format="fenced",
            cold_start={"data": "expert", "steps": steps, "batch_size": 32, "lr": 2e-3},
        )
        .rollouts(max_turn_tokens=24)
        .training(lr=1e-5, group_size=8, groups_per_step=16)
        .reporting(progress=False, record=record)
        .debugging(seed=SEED, deterministic=True)
        .build_algo()
    )
    algorithm.run_directory = str(directory)
    return algorithm


def timed_iteration(algorithm):
    """CPU seconds of all threads, and the result."""
    began = time.process_time()
    result = algorithm.train()
    if algorithm._recorder is not None:
        algorithm._recorder.flush()
    return time.process_time() - began, result


def seconds_of_events(run, results):
    """CPU seconds of all threads for the events of these iterations."""
    for name in ("once", "again"):  # what is loaded once is not a cost of iterations
        began = time.process_time()
        last = results[0]["training_iteration"] - 1
        board = TensorBoardLog(run / name, Location.of(run), last)
        for result in results:
            board.write(numbers(result), result["training_iteration"])
        board.close()
    return time.process_time() - began


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--cold-start", type=int, default=150, metavar="STEPS")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    report = Report("record_cost", THRESHOLDS, [SEED])
    ray_was_there = ray.is_initialized()
    with tempfile.TemporaryDirectory() as folder:
        recording = build(1.0, Path(folder) / "run", args.cold_start)
        silent = build("none", folder, args.cold_start)
        recording._recorder.__class__ = TimedRecorder
        for algorithm in (recording, silent):
            algorithm.train()  # what is loaded once is not a cost of iterations
        recording._recorder.flush()
        recording._recorder.seconds = 0.0
        gc.collect()
        gc.freeze()
        with_it, without, results = [], [], []
        for number in range(args.iterations):
            pair = [(recording, with_it), (silent, without)]
            for algorithm, times in pair if number % 2 else reversed(pair):
                seconds, result = timed_iteration(algorithm)
                times.append(seconds)
                if algorithm is recording:
                    results.append(result)
        gc.unfreeze()
        for algorithm in (recording, silent):
            algorithm.stop()
        if not ray_was_there:
            ray.shutdown()  # its threads take time, too
        events = seconds_of_events(Path(folder) / "run", results)
        written = [file.stat().st_size for file in Path(folder).glob("run/record/*.parquet")]
        report.add(
            {
                "trajectories": 128,
                "turns": result["turn"]["per_trajectory"],
                "tokens": result["tokens"]["sampled"],
                "iteration_s": median(without),
                "record_s": recording._recorder.seconds / args.iterations,
                "tensorboard_s": events / args.iterations,
                "tensorboard_share": events / sum(with_it),
                "recording_share": recording._recorder.seconds / sum(with_it),
                "ratio": median(a / b for a, b in zip(with_it, without, strict=True)),
                "file_kb": median(written) / 1e3,
            }
        )
    return report.finish(args.json)


if __name__ == "__main__":
    sys.exit(main())
