"""Runs of RLlib's PPO on tiny environments: files, resuming, full disks, signals, sweeps."""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rllib_gtpo.cli import main
from rllib_gtpo.command.directory import RunDirectory, SaveError
from tests.disks import small_disk

# A run uses the Ray session that is there, so the tests start Ray once.
pytestmark = pytest.mark.usefixtures("ray_session")

ROOT = Path(__file__).resolve().parent.parent
YAML = """\
tiny:
  run: PPO
  env: CartPole-v1
  stop: {training_iteration: 2}
  config:
    num_env_runners: 0
    train_batch_size_per_learner: 64
    minibatch_size: 32
    num_epochs: 1
    model_config: {fcnet_hiddens: [8]}
"""

# An environment class and an algorithm that exist only in the experiment file.  `env_config` holds
# what a test wants the algorithm to do.
PYTHON = """\
import os, signal, time
import gymnasium as gym
import numpy as np
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from rllib_gtpo.errors import Interrupted

class Corridor(gym.Env):
    observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def __init__(self, config=None):
        self.length = (config or {}).get("length", 3)

    def reset(self, *, seed=None, options=None):
        self.x = self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.x, self.steps = max(0, self.x + (1 if action else -1)), self.steps + 1
        here = np.array([self.x], np.float32)
        return here, -0.1, self.x >= self.length, self.steps >= 20, {}

class Task(PPO):
    held_out_accuracy = None
    asked = False

    @property
    def wish(self):
        return self.config.env_config

    def on_run_start(self):
        print("start hook")

    def on_run_end(self):
        print("end hook")
        self.held_out_accuracy = (0.5, 0.926)

    def request_stop(self):
        self.asked = True

    def summary_line(self, result):
        return f"line {result['training_iteration']}"

    def training_step(self):
        for _ in range(self.wish.get("naps", 0)):
            time.sleep(0.05)
            if self.asked and self.wish.get("interruptible"):
                raise Interrupted
        if self.wish.get("hang") and self.iteration:
            print("hanging", flush=True)
            time.sleep(60)
        super().training_step()
        if self.wish.get("fill") and self.iteration == 2:
            stat = os.statvfs(self.wish["fill"])
            with open(os.path.join(self.wish["fill"], "filler"), "wb") as file:
                file.write(b"x" * (stat.f_bavail * stat.f_bsize - 60_000))

    def save_checkpoint(self, directory):
        if self.wish.get("kill") and self.iteration == 2:
            with open(os.path.join(directory, "algorithm_state.pkl"), "w") as file:
                file.write("half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        super().save_checkpoint(directory)

config = (
    PPOConfig(algo_class=Task)
    .environment(Corridor, env_config={"length": 4})
    .env_runners(num_env_runners=0)
    .training(train_batch_size_per_learner=40, minibatch_size=20, num_epochs=1)
    .rl_module(model_config={"fcnet_hiddens": [8]})
)
stop = {"training_iteration": 2}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(YAML)
    (tmp_path / "task.py").write_text(PYTHON)
    return tmp_path


def train(*args: str) -> int:
    return main(["train", "file", *args])


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "result.json").read_text().splitlines()]


def checkpoints(run: Path) -> list[str]:
    return sorted(p.name for p in run.glob("checkpoint_*"))


def test_yaml_run_files_resume_and_completion(folder, capsys):
    assert train("tiny.yaml") == 0
    out = capsys.readouterr().out.splitlines()
    run = next((folder / "runs").iterdir())
    assert re.fullmatch(r"tiny_\d{8}-\d{6}", run.name)
    assert re.match(r"iteration 1  episode_return_mean [\d.]+  env steps \d+  [\d.]+ s", out[1])
    assert out[-2:] == [
        str(run / "checkpoint_000002"),
        f"rllib train file tiny.yaml --resume runs/{run.name}",
    ]
    assert [r["training_iteration"] for r in rows(run)] == [1, 2]
    assert rows(run)[0]["env_runners"]["num_env_steps_sampled_lifetime"] >= 64
    assert json.loads((run / "params.json").read_text())["num_env_runners"] == 0
    events = list(run.glob("events.out.tfevents.*"))
    assert len(events) == 1
    assert events[0].stat().st_size > 1000
    record = json.loads((run / "run.json").read_text())
    assert (record["algorithm"], record["status"]) == ("PPO", "completed")
    assert record["versions"]["ray"].startswith("2.60")

    # Complete: nothing is trained.
    assert train("tiny.yaml", "--resume", str(run)) == 0
    assert "already complete" in capsys.readouterr().out
    assert len(rows(run)) == 2

    before = rows(run)[1]
    # A later stop criterion goes on counting, in the same files; rows of a killed run are dropped.
    with (run / "result.json").open("a") as file:
        file.write('{"training_iteration": 3}\n{"training_iter')
    assert train("tiny.yaml", "--resume", str(run), "--stop", "training_iteration=4") == 0
    assert [r["training_iteration"] for r in rows(run)] == [1, 2, 3, 4]
    after = rows(run)[2]
    assert after["time_total_s"] > before["time_total_s"]
    steps = [r["env_runners"]["num_env_steps_sampled_lifetime"] for r in rows(run)]
    assert steps[2] > steps[1]
    with (run / "progress.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["training_iteration"] for row in table] == ["1", "2", "3", "4"]
    assert all(row["env_runners/episode_return_mean"] for row in table)
    assert checkpoints(run) == ["checkpoint_000002", "checkpoint_000004"]

    # From a checkpoint that is not the newest: the newer one is set aside, not deleted.
    chosen = str(run / "checkpoint_000002")
    assert train("tiny.yaml", "--resume", chosen, "--stop", "training_iteration=3") == 0
    assert checkpoints(run) == ["checkpoint_000002", "checkpoint_000003"]
    assert (run / "superseded_checkpoint_000004").is_dir()
    assert [r["training_iteration"] for r in rows(run)] == [1, 2, 3]


def test_python_file_hooks_overrides_and_retention(folder, capsys):
    options = ["--override", "env_config.length=2", "--override", "lr=1e-3"]
    options += ["--override", "model_config.fcnet_activation=relu"]
    code = train("task.py", "--out", "a run", *options, "--checkpoint-freq", "1", "--keep", "1")
    assert code == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "run directory: a run",
        "start hook",
        "line 1",
        "line 2",
        "done: training_iteration = 2 reached 2",
        "end hook",
        "held-out accuracy 0.50 -> 0.93",
        str(folder / "a run" / "checkpoint_000002"),
        "rllib train file task.py --resume 'a run'",
    ]
    run = folder / "a run"
    assert checkpoints(run) == ["checkpoint_000002"]
    params = json.loads((run / "params.json").read_text())
    assert params["env_config"] == {"length": 2}
    assert params["lr"] == 1e-3
    assert params["_model_config"] == {"fcnet_hiddens": [8], "fcnet_activation": "relu"}

    # The overrides come back with the run; the printed end is the same when there is nothing to do.
    assert train("task.py", "--resume", "a run") == 0
    assert capsys.readouterr().out.splitlines()[-3:] == out[-3:]
    assert train("task.py", "--resume", "a run", "--stop", "training_iteration=3") == 0
    assert json.loads((run / "params.json").read_text())["env_config"] == {"length": 2}

    # Refusals.
    assert train("task.py", "--out", "a run") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert train("tiny.yaml", "--resume", "a run") == 2
    assert "is a run of" in capsys.readouterr().err
    for checkpoint in run.glob("checkpoint_*"):
        (checkpoint / "progress.json").unlink()
    assert train("task.py", "--resume", "a run") == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_unknown_stop_key_ends_after_one_iteration(folder, capsys):
    assert train("tiny.yaml", "--stop", "episode_return_mean=5") == 2
    captured = capsys.readouterr()
    assert "did you mean 'env_runners/episode_return_mean'" in captured.err
    assert captured.out.count("iteration") == 1


def test_failure_in_training_exits_1_and_names_the_last_checkpoint(folder, capsys):
    text = PYTHON.replace("super().training_step()", "assert self.iteration < 1, 'broken task'")
    (folder / "task.py").write_text(text)
    assert train("task.py", "--checkpoint-freq", "1", "--out", "r") == 1
    captured = capsys.readouterr()
    assert "broken task" in captured.err
    assert f"last good checkpoint: {folder / 'r' / 'checkpoint_000001'}" in captured.err


def test_a_failure_begins_again_from_the_last_checkpoint(folder, capsys):
    text = PYTHON.replace(
        "        super().training_step()\n",
        "        if self.iteration == 1 and Task.lost < 2:\n"
        "            Task.lost += 1\n"
        "            raise RuntimeError('the engine is lost')\n"
        "        super().training_step()\n",
    ).replace("    asked = False\n", "    asked = False\n    lost = 0\n")
    (folder / "task.py").write_text(text)
    options = ["--checkpoint-freq", "1", "--stop", "training_iteration=3"]
    assert train("task.py", *options, "--max-failures", "2", "--out", "r") == 0
    captured = capsys.readouterr()
    assert captured.err.count("warning: RuntimeError: the engine is lost") == 2
    assert captured.err.count("starting again from checkpoint_000001") == 2
    assert [r["training_iteration"] for r in rows(folder / "r")] == [1, 2, 3]
    assert [r["run"]["failures"] for r in rows(folder / "r")] == [0, 2, 2]
    assert json.loads((folder / "r" / "run.json").read_text())["failures"] == 2

    assert train("task.py", *options, "--max-failures", "1", "--out", "s") == 1
    assert "last good checkpoint" in capsys.readouterr().err


def test_checkpoints_by_the_clock(folder, capsys):
    (folder / "task.py").write_text(PYTHON + "checkpoint_freq = 0\ncheckpoint_minutes = 1e-6\n")
    assert train("task.py", "--out", "r", "--keep", "9", "--stop", "training_iteration=3") == 0
    assert len(checkpoints(folder / "r")) == 3
    options = ["--keep", "9", "--checkpoint-minutes", "9"]
    assert train("task.py", "--out", "s", *options, "--stop", "training_iteration=3") == 0
    assert checkpoints(folder / "s") == ["checkpoint_000003"]
    (folder / "task.py").write_text(PYTHON + "checkpoint_minutes = 'often'\n")
    assert train("task.py") == 2
    assert "checkpoint_minutes must be a number of at least 0" in capsys.readouterr().err


def test_full_disk_by_injected_error(tmp_path):
    """ENOSPC from the file system; also as torch reports it.  Needs no training."""
    from rllib_gtpo.command.directory import RunRecord

    run = RunDirectory.create(tmp_path / "r", RunRecord("f", "", "n", "PPO"))
    good = run.save(
        1, {"training_iteration": 1}, lambda d: (Path(d) / "x").write_bytes(b"0" * 5000)
    )

    def full(directory: str) -> None:
        (Path(directory) / "part").write_bytes(b"0" * 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_in_torch(directory: str) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    for write in (full, full_in_torch):
        with pytest.raises(SaveError, match=r"needs about \d+ KB, .* free in"):
            run.save(2, {}, write)
        assert run.checkpoints() == [good]
        assert checkpoints(tmp_path / "r") == ["checkpoint_000001"]

    def bug(directory: str) -> None:
        raise TypeError("a bug, not a disk")

    with pytest.raises(TypeError):
        run.save(2, {}, bug)
    assert run.save(1, {}, lambda d: None).path.name == "checkpoint_000001-1"
    assert [c.path.name for c in run.checkpoints()] == ["checkpoint_000001", "checkpoint_000001-1"]


def test_full_disk_for_real(folder, capsys):
    """Iteration 3 fills a small file system: training goes on, the final save says exit code 3."""
    with small_disk(folder / "disk", 4) as disk:
        run = disk.path / "r"
        wish = ["--override", f"env_config.fill={disk.path}", "--stop", "training_iteration=5"]
        assert train("task.py", "--out", "disk/r", "--checkpoint-freq", "1", *wish) == 3
        captured = capsys.readouterr()
        assert "line 5" in captured.out
        assert captured.err.count("training goes on") == 2
        assert f"last good checkpoint: {run / 'checkpoint_000002'}" in captured.err
        assert not list(run.glob("*.tmp-*"))
        assert rows(run)[-1]["run"] == {"failures": 0, "failed_saves": 2}
        disk.free()
        rest = ["--override", "env_config.fill=null", "--stop", "training_iteration=3"]
        assert train("task.py", "--resume", "disk/r", *rest) == 0


class Process:
    """A run in its own process group, as a terminal would start it."""

    def __init__(self, folder: Path, *args: str) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "envs")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rllib_gtpo.cli", "train", "file", "task.py", *args],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "RAY_ADDRESS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.seen: list[str] = []

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.seen.append(text.rstrip())
            if line in text:
                return
        raise AssertionError((self.seen, self.process.stderr and self.process.stderr.read()))

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, list[str], str]:
        try:
            out, err = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, self.seen + out.splitlines(), err


def test_first_ctrl_c_saves_and_the_run_continues(folder, capsys):
    wish = ["--override", "env_config.naps=100", "--override", "env_config.interruptible=true"]
    process = Process(folder, "--out", "r", "--stop", "training_iteration=50", *wish)
    process.wait_for("start hook")
    time.sleep(0.5)
    process.send(signal.SIGINT)  # in the middle of a step: Interrupted leaves it
    code, out, err = process.end()
    assert code == 130, err
    assert err.strip() == "finishing this step, then saving; press Ctrl-C again to quit at once"
    assert out[-3:] == [
        "interrupted; continue with the last line",
        str(folder / "r" / "checkpoint_000000"),
        "rllib train file task.py --resume r",
    ]
    assert "end hook" not in out
    rest = ["--override", "env_config.naps=0", "--stop", "training_iteration=1"]
    assert train("task.py", "--resume", "r", *rest) == 0
    assert "line 1" in capsys.readouterr().out


@pytest.mark.slow
def test_second_ctrl_c_quits_at_once(folder):
    wish = ["--override", "env_config.hang=true"]
    process = Process(folder, "--out", "r", "--checkpoint-freq", "1", *wish)
    process.wait_for("hanging")
    process.send(signal.SIGINT)
    time.sleep(0.5)
    start = time.perf_counter()
    process.send(signal.SIGINT)
    code, out, err = process.end()
    assert code == 130
    assert time.perf_counter() - start < 15
    assert "Traceback" not in err
    assert checkpoints(folder / "r") == ["checkpoint_000001"]
    assert out[-1] == "rllib train file task.py --resume r"


def test_kill_during_a_save_leaves_the_last_good_one(folder, capsys):
    wish = ["--override", "env_config.kill=true", "--checkpoint-freq", "1"]
    process = Process(folder, "--out", "r", "--stop", "training_iteration=9", *wish)
    code, _, err = process.end()
    assert code == -signal.SIGKILL, err
    names = checkpoints(folder / "r")
    assert names[0] == "checkpoint_000001"
    assert names[1].startswith("checkpoint_000002.tmp-")
    rest = ["--override", "env_config.kill=false", "--stop", "training_iteration=2"]
    assert train("task.py", "--resume", "r", *rest) == 0
    assert "at iteration 1" in capsys.readouterr().out
    assert checkpoints(folder / "r") == ["checkpoint_000001", "checkpoint_000002"]
    assert [r["training_iteration"] for r in rows(folder / "r")] == [1, 2]


@pytest.mark.slow
def test_sigterm_saves_and_exits_143(folder):
    process = Process(folder, "--out", "r", "--stop", "training_iteration=99999")
    process.wait_for("line 2")
    process.send(signal.SIGTERM)
    code, _, err = process.end()
    assert code == 143, err
    assert len(checkpoints(folder / "r")) >= 1


@pytest.mark.slow
def test_closed_pipe_saves_quietly(folder):
    process = Process(folder, "--out", "r", "--stop", "training_iteration=99999")
    process.wait_for("line 1")
    assert process.process.stdout is not None
    process.process.stdout.close()
    assert process.process.wait(timeout=60) == 141
    assert process.process.stderr is not None
    assert process.process.stderr.read() == ""
    assert len(checkpoints(folder / "r")) >= 1


@pytest.mark.slow
def test_remote_runner_gets_the_class_and_prints_no_noise(folder):
    process = Process(folder, "--override", "num_env_runners=1")
    code, out, err = process.end()
    assert code == 0, err
    assert out[-3] == "held-out accuracy 0.50 -> 0.93"
    assert err == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_grid_search_runs_through_tune(folder, capsys):
    (folder / "tiny.yaml").write_text(YAML + "    lr: {grid_search: [1e-3, 1e-4]}\n")
    assert train("tiny.yaml", "--out", "sweep") == 0
    trials = [p.parent for p in (folder / "sweep" / "tune").glob("*/result.json")]
    assert len(trials) == 2
    assert sorted(json.loads((t / "params.json").read_text())["lr"] for t in trials) == [1e-4, 1e-3]
    assert all(list(t.glob("checkpoint_*")) for t in trials)
    assert "rllib train file tiny.yaml --resume sweep" in capsys.readouterr().out
    assert train("tiny.yaml", "--resume", "sweep") == 0
