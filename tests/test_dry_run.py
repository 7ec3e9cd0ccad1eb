"""`rllib train --dry-run`: what would run, and who said so; nothing is started."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from rllib_gtpo.cli import main
from rllib_gtpo.command.yaml_text import parse_yaml

ROOT = Path(__file__).parents[1]
YAML = """\
calculator:
  run: GTPO
  env: rllib_gtpo_envs.Calculator
  stop: {training_iteration: 25}
  config:
    cold_start:
      steps: 30
    lr: 2.0e-4
    env_config: {max_ops: 3}
"""
PYTHON = """\
import gymnasium as gym
import numpy as np
from ray import tune
from ray.rllib.algorithms.ppo import PPO, PPOConfig

class Corridor(gym.Env):
    observation_space = gym.spaces.Box(0, 100, (1,), np.float32)
    action_space = gym.spaces.Discrete(2)

class Task(PPO):
    pass

config = (
    PPOConfig(algo_class=Task)
    .environment(Corridor, env_config={"length": 4, "shape": lambda x: x})
    .training(lr=tune.qloguniform(1e-4, 1e-2, 1e-4), gamma=np.float64(0.5))
)
num_samples = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.yaml").write_text(YAML)
    (tmp_path / "task.py").write_text(PYTHON)
    return tmp_path


def dry(capsys, *args: str) -> dict[str, str]:
    """What is printed, as {"lr: 0.1": "task.yaml:3"}; it is YAML without the comments."""
    assert main(["train", *args, "--dry-run"]) == 0
    page = capsys.readouterr().out
    rows = (line.strip().split("  # ") for line in page.splitlines() if "  # " in line)
    dry.page, (dry.tree,) = page, parse_yaml(page, "page")[0].values()
    return {row[0].strip(): row[1] for row in rows if len(row) == 2}


def test_each_value_has_its_source(folder, capsys):
    rows = dry(
        capsys,
        "file",
        "task.yaml",
        "--override=cold_start.batch_size=8",
        "--override=group_size=4",
        "--stop=evaluation/accuracy=0.9",
        "--checkpoint-freq=2",
        "--checkpoint-minutes=1.5",
    )
    assert rows == {
        "run: GTPO": "task.yaml:2",
        "env: rllib_gtpo_envs.Calculator": "task.yaml:3",
        "training_iteration: 25": "task.yaml:4",
        "evaluation/accuracy: 0.9": "--stop evaluation/accuracy=0.9",
        "checkpoint_freq: 2": "--checkpoint-freq 2",
        "checkpoint_minutes: 1.5": "--checkpoint-minutes 1.5",
        "steps: 30": "task.yaml:7",
        "batch_size: 8": "--override cold_start.batch_size=8",
        "lr: 0.0002": "task.yaml:8",
        "max_ops: 3": "task.yaml:9",
        "group_size: 4": "--override group_size=4",
    }
    assert "more have their defaults; --all shows them" in dry.page
    assert sorted(folder.iterdir()) == [folder / "task.py", folder / "task.yaml"]


def test_what_it_prints_is_an_experiment_again(folder, capsys):
    dry(capsys, "file", "task.yaml", "--override=top_p=0.5", "--checkpoint-minutes=3")
    tree = dry.tree
    (folder / "printed.yaml").write_text(dry.page)
    rows = dry(capsys, "file", "printed.yaml")
    assert dry.tree == tree
    assert rows["top_p: 0.5"].startswith("printed.yaml:")
    assert rows["checkpoint_minutes: 3.0"].startswith("printed.yaml:")


def test_all_shows_defaults_and_whose_they_are(folder, capsys):
    rows = dry(capsys, "file", "task.yaml", "--all")
    assert rows["gamma: 0.9"] == "package default"
    assert rows["num_learners: 0"] == "RLlib default"
    assert rows["lr: 0.0002"] == "task.yaml:8"
    assert list(dry.tree["config"])[:3] == ["cold_start", "lr", "env_config"]
    assert dry.tree["config"]["model"]["model_type"] == "qwen2"
    assert dry.tree["config"]["env_runner_cls"] == "rllib_gtpo.env_runner.GTPOEnvRunner"


def test_objects_of_a_python_file(folder, capsys):
    rows = dry(capsys, "file", "task.py", "--override=num_env_runners=0")
    assert rows == {
        "run: Task": "task.py",
        "env: task.py:Corridor": "task.py",
        "num_samples: 3": "task.py",
        "checkpoint_freq: 10": "default",
        "num_env_runners: 0": "--override num_env_runners=0",
        "length: 4": "task.py",
        "shape: task.py:15:<lambda>": "task.py",
        "lr: {qloguniform: [0.0001, 0.01, 0.0001]}": "task.py",
        "gamma: 0.5": "task.py",
    }
    assert "Tune chooses lr" in dry.page and "until Ctrl-C" in dry.page


def test_names_instead_of_a_file(folder, capsys):
    config = ["--config", "lr=1e-3", "lambda=0.9", "--override", "lr=1e-2"]
    rows = dry(capsys, "--algo", "PPO", "--env", "CartPole-v1", *config)
    assert rows == {
        "run: PPO": "--algo PPO",
        "env: CartPole-v1": "--env CartPole-v1",
        "checkpoint_freq: 10": "default",
        "lr: 0.01": "--override lr=1e-2",
        "lambda: 0.9": "--config lambda=0.9",
    }


def test_search_spaces_from_options(folder, capsys):
    spaces = ["lr={grid_search: [1e-4, 1e-3]}", "optimizer.weight_decay={uniform: [0, 0.1]}"]
    rows = dry(capsys, "file", "task.yaml", *(f"--override={space}" for space in spaces))
    assert rows["lr: {grid_search: [0.0001, 0.001]}"] == f"--override {spaces[0]}"
    assert rows["weight_decay: {uniform: [0, 0.1]}"] == f"--override {spaces[1]}"
    assert rows["name: AdamW"] == "package default"  # the mapping is shown as a whole
    assert "Tune chooses lr, optimizer.weight_decay" in dry.page


EXAMPLES = [
    pytest.param(path, id=path.name)
    for path in sorted((ROOT / "tuned_examples").iterdir())
    if path.suffix in (".py", ".yaml")
]


@pytest.mark.parametrize("path", EXAMPLES)
def test_every_example_can_be_checked(path, capsys):
    code = main(["train", "file", str(path), "--dry-run"])
    captured = capsys.readouterr()
    if "vllm" in path.name and find_spec("vllm") is None:
        assert code == 2 and "needs vLLM, which is not installed" in captured.err
        return
    assert code == 0, captured.err
    assert "training_iteration:" in captured.out
