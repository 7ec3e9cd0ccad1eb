"""Callbacks of Tune on single runs: what they are told, and that they cannot end a training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rllib_gtpo.cli import main

pytestmark = pytest.mark.usefixtures("ray_session")

FILE = """\
import json
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.tune.logger import LoggerCallback

class Task(PPO):
    def training_step(self):
        super().training_step()
        assert self.iteration < BREAKS_AT, "broken task"

    @staticmethod
    def summary_line(result):
        return ""

class Recorder(LoggerCallback):
    def tell(self, *words):
        with open("told", "a") as file:
            print(*words, file=file)

    def setup(self, **info):
        self.tell("setup", info["total_num_samples"])

    def log_trial_start(self, trial):
        self.tell("start", trial, trial.config["gamma"], trial.status, trial.local_path)
        with open("ids", "a") as file:
            print(trial.trial_id, file=file)

    def log_trial_restore(self, trial):
        self.tell("restore")

    def log_trial_result(self, iteration, trial, result):
        assert result["config"]["gamma"] == 0.5 and result["env_runners"]
        self.tell("result", result["training_iteration"], result["done"])

    def log_trial_save(self, trial):
        self.tell("save", trial.checkpoint.path.rpartition("/")[2])

    def log_trial_end(self, trial, failed=False):
        self.tell("end", "failed" if failed else "well", trial.status)

    def on_experiment_end(self, trials, **info):
        self.tell("over", len(trials))

class Broken(LoggerCallback):
    def log_trial_result(self, iteration, trial, result):
        raise ConnectionError("the server is away")

class Refuses(LoggerCallback):
    def setup(self, **info):
        raise ValueError("no key")

config = (
    PPOConfig(algo_class=Task)
    .environment("CartPole-v1")
    .env_runners(num_env_runners=0)
    .training(gamma=0.5, train_batch_size_per_learner=40, minibatch_size=20, num_epochs=1)
    .rl_module(model_config={"fcnet_hiddens": [8]})
)
stop = {"training_iteration": 2}
"""


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains an experiment file with some callbacks; returns what they were told."""
    monkeypatch.chdir(tmp_path)

    def run(callbacks, *options, breaks_at=99, code=0):
        Path("told").write_text("")
        Path("task.py").write_text(f"BREAKS_AT = {breaks_at}\n{FILE}callbacks = [{callbacks}]\n")
        assert main(["train", "file", "task.py", *options]) == code
        return Path("told").read_text().splitlines()

    return run


def test_what_a_callback_is_told_also_when_the_run_goes_on(train, tmp_path):
    told = train("Recorder()", "--out", "r", "--checkpoint-freq", "1")
    assert told == [
        "setup 1",
        f"start r 0.5 RUNNING {tmp_path / 'r'}",
        "result 1 False",
        "save checkpoint_000001",
        "result 2 True",
        "save checkpoint_000002",
        "end well TERMINATED",
        "over 1",
    ]
    told = train("Recorder()", "--resume", "r", "--stop", "training_iteration=3")
    assert told[2:] == [
        "restore",
        "result 3 True",
        "save checkpoint_000003",
        "end well TERMINATED",
        "over 1",
    ]
    first, second = Path("ids").read_text().split()
    assert first == second == json.loads(Path("r/run.json").read_text())["trial_id"]


def test_a_callback_that_breaks_is_left_out(train, capsys):
    told = train("Broken(), Recorder()", "--out", "r")
    assert told[-2:] == ["end well TERMINATED", "over 1"] and "result 2 True" in told
    warning = "Broken.on_trial_result failed and is left out: the server is away"
    assert capsys.readouterr().err.count(warning) == 1


def test_one_that_cannot_start_is_bad_input(train, capsys):
    told = train("Recorder(), Refuses()", "--out", "r", code=2)
    assert told[-2:] == ["end failed ERROR", "over 1"]
    assert "the callback Refuses cannot start: no key" in capsys.readouterr().err


def test_a_training_that_fails_is_told(train, capsys):
    told = train("Recorder()", "--out", "r", "--checkpoint-freq", "1", breaks_at=1, code=1)
    assert told[2:] == ["result 1 False", "save checkpoint_000001", "end failed ERROR", "over 1"]
    assert "broken task" in capsys.readouterr().err


def test_mlflow_for_real(train, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    store = f"sqlite:///{tmp_path}/mlflow.db"
    logger = f"MLflowLogger(tracking_uri={store!r}, experiment_name='agents')"
    train(f"(__import__('rllib_gtpo.tracking').tracking.{logger})", "--out", "r")
    mlflow.set_tracking_uri(store)
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (run.info.run_name, run.info.status) == ("r", "FINISHED")
    assert run.data.metrics["training_iteration"] == 2.0
    assert run.data.params["gamma"] == "0.5"


def test_wandb_for_real(train, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    module = "__import__('ray.air.integrations.wandb', fromlist=['x'])"
    train(f"{module}.WandbLoggerCallback(project='agents', mode='offline')", "--out", "r")
    name = json.loads(Path("r/run.json").read_text())["trial_id"]
    (written,) = Path("r/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    assert written.stat().st_size > 1000
