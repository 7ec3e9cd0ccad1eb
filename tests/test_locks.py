"""Two trainers, and readers of what is being written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from rllib_gtpo.command.checkpoint import held_checkpoint
from rllib_gtpo.command.directory import RunDirectory, RunRecord
from rllib_gtpo.command.locks import kept, one_trainer
from rllib_gtpo.errors import ConfigError


@pytest.fixture
def run(tmp_path):
    return RunDirectory.create(tmp_path / "run", RunRecord("task.py", "0", "run", "GTPO"), keep=1)


def save(run, iteration):
    def write(folder):
        for name in ("rllib_checkpoint.json", "weights"):
            with open(f"{folder}/{name}", "w") as file:
                file.write(str(iteration))

    return run.save(iteration, {"training_iteration": iteration}, write).path


def test_a_second_trainer_is_refused_until_the_first_has_ended(run):
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from rllib_gtpo.command.locks import one_trainer\n"
        "with one_trainer(Path(sys.argv[1])):\n"
        "    print('trains', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run.path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout.readline() == b"trains\n"
    with (
        pytest.raises(ConfigError, match=rf"is being trained by process {process.pid} on "),
        one_trainer(run.path),
    ):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with one_trainer(run.path):
        pass


def test_a_checkpoint_that_is_read_is_not_deleted_until_it_is_no_more(run):
    first = save(run, 1)
    with held_checkpoint(run.path) as checkpoint:
        assert checkpoint == first
        save(run, 2)
        assert (first / "weights").read_text() == "1"
    save(run, 3)
    assert [c.iteration for c in run.checkpoints()] == [3]
    with kept(first) as in_time:
        assert not in_time
    with pytest.raises(ConfigError, match="no such directory"), held_checkpoint(first):
        pass


def test_readers_never_see_half_a_checkpoint(run):
    """Each of a few hundred, while they come and go."""
    save(run, 0)
    over = threading.Event()
    wrong = []

    def read():
        try:
            follow()
        except Exception as error:
            wrong.append(error)

    def follow():
        while not over.is_set():
            with held_checkpoint(run.path) as checkpoint:
                texts = {(checkpoint / n).read_text() for n in ("rllib_checkpoint.json", "weights")}
                now = int(texts.pop())
                if texts or f"{now:06d}" not in checkpoint.name:
                    wrong.append((checkpoint, texts, now))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for iteration in range(1, 200):
        save(run, iteration)
    over.set()
    for reader in readers:
        reader.join()
    assert not wrong
    save(run, 200)
    assert [c.iteration for c in run.checkpoints()] == [200]
    assert not list(run.path.glob("*.tmp-*"))
