"""Runs that start from names or examples; runs of other versions, and damaged checkpoints."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from rllib_gtpo.cli import main
from rllib_gtpo.command.directory import RunDirectory, RunRecord
from rllib_gtpo.command.export import export
from rllib_gtpo.command.ray_session import ray_session
from rllib_gtpo.command.run import RunOptions
from rllib_gtpo.errors import ConfigError

pytestmark = pytest.mark.usefixtures("ray_session")

TINY = [
    *("num_env_runners=0", "train_batch_size_per_learner=64", "minibatch_size=32"),
    *("num_epochs=1", "model_config.fcnet_hiddens=[8]"),
]
NAMES = ["train", "--algo", "PPO", "--env", "CartPole-v1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, ray_session):
    """A run without a file, with two checkpoints."""
    run = tmp_path_factory.mktemp("runs") / "a run"
    stop = ["--stop", "training_iteration=2", "--checkpoint-freq", "1", "--num-gpus", "0"]
    assert main([*NAMES, "--config", *TINY, *stop, "--out", str(run)]) == 0
    return run


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, "r"))


def change_record(run, **changes):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, **changes}))


def test_a_run_without_a_file_goes_on(run, capsys):
    assert main([*NAMES, "--resume", "r", "--stop", "training_iteration=3"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "rllib train --algo PPO --env CartPole-v1 --resume r"
    params = json.loads((run / "params.json").read_text())
    assert (params["minibatch_size"], params["_model_config"]) == (32, {"fcnet_hiddens": [8]})
    assert main([*NAMES[:-1], "Acrobot-v1", "--resume", "r"]) == 2
    told = "r is a run of --algo PPO --env CartPole-v1, not of --algo PPO --env Acrobot-v1"
    assert told in capsys.readouterr().err


def test_what_a_resumed_run_was_started_with_is_shown(run, capsys):
    assert main([*NAMES, "--resume", "r", "--override", "num_epochs=2", "--dry-run"]) == 0
    rows = [line.split("  # ") for line in capsys.readouterr().out.splitlines() if "  # " in line]
    shown = {key.strip(): place for key, place in rows if not key.startswith("#")}
    assert shown["minibatch_size: 32"] == "r: --override minibatch_size=32"
    assert shown["num_epochs: 2"] == "--override num_epochs=2"
    assert shown["training_iteration: 2"] == "r: --stop training_iteration=2"


def test_an_example_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["example", "run", "ppo_cartpole.yaml", "--stop", "training_iteration=1"]
    assert main([*command, "--override", "num_epochs=1", "--out", "folder/of runs"]) == 0
    out = capsys.readouterr().out
    assert "done: training_iteration = 1 reached 1" in out
    assert out.splitlines()[-1].endswith("ppo_cartpole.yaml --resume 'folder/of runs'")


def test_a_run_of_another_version(run, capsys):
    change_record(run, versions={"ray": "2.59.0", "rllib-gtpo": "0.0.9"})
    assert main([*NAMES, "--resume", "r"]) == 0  # complete: nothing to do
    told = "note: r was last trained with rllib-gtpo 0.0.9 (here 0.1.0), ray 2.59.0 (here 2.60.0)"
    assert told in capsys.readouterr().err

    change_record(run, versions={"rllib-gtpo": "9.9.9"}, colour="red")
    assert main([*NAMES, "--resume", "r"]) == 2
    told = capsys.readouterr().err
    assert "was written by rllib-gtpo 9.9.9; colour means nothing to this one (0.1.0)" in told
    for text in ("{", "[]", '{"file": 1}'):
        (run / "run.json").write_text(text)
        assert main([*NAMES, "--resume", "r"]) == 2
        assert "run.json is damaged" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_told_with_what_else_there_is(run, capsys):
    more = ["--stop", "training_iteration=3"]
    last = run / "checkpoint_000002"
    weights = next(last.rglob("default_policy/module_state.pkl"))
    weights.write_bytes(weights.read_bytes()[:100])
    change_record(run, versions={"torch": "1.0"})
    assert main([*NAMES, "--resume", "r", *more]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "r/checkpoint_000002 cannot be read: a file of it is missing or damaged" in told
    assert "It was written with torch 1.0 (here " in told
    assert told.rstrip().endswith("There is also r/checkpoint_000001")
    weights.unlink()
    assert main([*NAMES, "--resume", "r", *more]) == 2
    assert "module_state.pkl" in capsys.readouterr().err
    assert main([*NAMES, "--resume", "r/checkpoint_000001", *more]) == 0

    (run / "checkpoint_000003" / "progress.json").write_text('{"metrics"')
    assert main([*NAMES, "--resume", "r"]) == 2
    assert "r/checkpoint_000003/progress.json is damaged" in capsys.readouterr().err


def test_a_run_that_did_not_begin_leaves_its_directory_free(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    directory = RunDirectory.create(Path("r"), RunRecord("", "", "n", "PPO"))
    assert RunDirectory.create(Path("r"), directory.record).path == Path("r")
    (tmp_path / "r" / "params.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run"):
        RunDirectory.create(Path("r"), directory.record)
    assert main([*NAMES, "--resume", "rr"]) == 2
    assert "there is no directory rr; did you mean 'r'?" in capsys.readouterr().err
    assert main(["train", "file", "r"]) == 2
    assert "r is a directory: name a .py or .yaml file" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.shutdown", lambda: None)  # of the session of the tests
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for option, variable in ((address, ""), (None, f"ray://{address}")):
            monkeypatch.setenv("RAY_ADDRESS", variable)
            with (
                pytest.raises(ConfigError, match=f"no Ray cluster answers at .*{address}"),
                ray_session({}, RunOptions(ray_address=option)),
            ):
                pass


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path):
    (run / "checkpoint_000002" / "class_and_ctor_args.pkl").write_bytes(b"")
    with pytest.raises(ConfigError, match="missing or damaged"):
        export(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()
