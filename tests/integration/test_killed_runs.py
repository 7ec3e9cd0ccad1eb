"""Runs that are killed, stopped or short of something lose no more than is said."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import ray

sys.path.insert(0, str(Path(__file__).parents[2] / "release"))

from killed_runs import (
    FREQUENCY,
    Life,
    checkpoints,
    differing,
    kill_and_resume,
    rows_of,
    run_to_the_end,
)

FILE = """\
import asyncio
from pathlib import Path
from rllib_gtpo import GTPOConfig
from tests.tasks import Adder

class Napping(Adder):
    # In rollouts of the split that is in the file "nap", as long as it is there.
    async def astep(self, action):
        folder = Path(self.env_config["folder"])
        while (folder / "nap").exists():
            if not self.trajectory.task["id"].startswith((folder / "nap").read_text()):
                break
            (folder / "napping").touch()
            await asyncio.sleep(0.1)
        return await super().astep(action)

config = (
    GTPOConfig()
    .environment(Napping, env_config={{"folder": {folder!r}}})
    .language_model(model={model!r})
    .rollouts(max_turn_tokens=64)
    .training(lr=[[0, 1e-3], [400, 1e-4]], group_size=4, groups_per_step=4)
    .evaluation(evaluation_interval=4, evaluation_duration=8)
    .reporting(progress=False, record=1.0)
    .debugging(seed=11, deterministic=True)
)
"""


def _serve(arguments, output):
    """In a fork: the command."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    from rllib_gtpo.cli import main

    sys.exit(main(arguments))


class Fork:
    """A process with everything imported already, so that ten of them start in seconds."""

    def __init__(self, arguments, output):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["rllib_gtpo.algorithm", "rllib_gtpo.command.trial"])
        self._process = context.Process(target=_serve, args=(arguments, str(output)))
        self._process.start()
        self.pid = self._process.pid

    def running(self):
        return self._process.is_alive()

    def wait(self):
        self._process.join(120)
        return self._process.exitcode


def arguments(folder, model, *more):
    (folder / "task.py").write_text(FILE.format(model=model, folder=str(folder)))
    address = ray.get_runtime_context().gcs_address
    return ["train", "file", str(folder / "task.py"), "--ray-address", address, *more]


ITERATIONS = 26


@pytest.fixture(scope="module")
def whole(adder_model, tmp_path_factory):
    """A run that nobody disturbs, and its pace."""
    folder = tmp_path_factory.mktemp("whole")
    command = arguments(folder, adder_model, "--stop", f"training_iteration={ITERATIONS}")
    pace = run_to_the_end(Fork, [*command, "--checkpoint-freq", str(FREQUENCY)], folder / "run")
    return folder / "run", pace


@pytest.mark.slow
def test_ten_kills_change_nothing(adder_model, whole, tmp_path):
    run, pace = whole
    command = arguments(tmp_path, adder_model, "--stop", f"training_iteration={ITERATIONS}")
    command += ["--checkpoint-freq", str(FREQUENCY)]
    killed = tmp_path / "killed"
    result = kill_and_resume(Fork, command, killed, ITERATIONS, 10, pace)
    assert len(result.lost) == 10 and max(result.lost) <= FREQUENCY
    assert [row["training_iteration"] for row in rows_of(killed)] == list(range(1, ITERATIONS + 1))
    assert differing(run, killed) == ([], 0)
    assert {"accuracy", "grad/norm", "env_runners/num_episodes_lifetime"} <= rows_of(run)[0].keys()
    assert checkpoints(killed)[-1].iteration == ITERATIONS
    assert not list(killed.glob("*.tmp*"))


def stopped(folder, process, split):
    """Seconds from SIGTERM, in the middle of rollouts of the split, to the end; and the code."""
    (folder / "napping").unlink(missing_ok=True)
    (folder / "nap").write_text(split)
    end = time.monotonic() + 120
    while not (folder / "napping").exists():
        assert time.monotonic() < end, (folder / "out").read_text()
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    code = process.wait()
    (folder / "nap").unlink()
    return code, time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("runners", [0, 1])
def test_sigterm_does_not_wait_for_rollouts(adder_model, whole, tmp_path, runners):
    run, out = tmp_path / "run", tmp_path / "out"
    command = arguments(tmp_path, adder_model, "--stop", "training_iteration=4")
    command += ["--override", f"num_env_runners={runners}", "--checkpoint-freq", "0"]
    life = Life(Fork([*command, "--out", str(run)], out), out)
    assert life.wait_for(1)
    code, seconds = stopped(tmp_path, life.process, "train")
    assert (code, seconds < 20) == (143, True), out.read_text()
    done = len(rows_of(run))
    assert [c.iteration for c in checkpoints(run)] == [done] and 1 <= done < 4
    again = Fork([*command, "--resume", str(run)], out)
    code, seconds = stopped(tmp_path, again, "validation")
    assert (code, seconds < 20) == (143, True), out.read_text()
    assert checkpoints(run)[-1].iteration == 4
    rows = rows_of(run)
    assert not any(name.startswith("evaluation/") for name in rows[3])
    if not runners:  # batches of other sizes are not equal to the last bit
        expected = rows_of(whole[0])[:4]
        assert rows == [{k: e[k] for k in row} for row, e in zip(rows, expected, strict=True)]
