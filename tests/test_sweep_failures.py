"""A trial of a sweep that fails begins again; checkpoints come by the clock."""

from __future__ import annotations

import json

import pytest

from rllib_gtpo.cli import main

SWEEP = """\
import os
from ray import tune
from ray.rllib.algorithms.ppo import PPO, PPOConfig

class Task(PPO):
    def training_step(self):
        super().training_step()
        mark = os.path.join({folder!r}, "failed")
        if self.iteration == 2 and self.config.lr == 1e-4 and not os.path.exists(mark):
            open(mark, "w").close()
            raise RuntimeError("the learner is lost")

config = (
    PPOConfig(algo_class=Task)
    .environment("CartPole-v1")
    .env_runners(num_env_runners=0)
    .training(
        lr=tune.grid_search([1e-3, 1e-4]),
        train_batch_size_per_learner=40, minibatch_size=20, num_epochs=1,
    )
    .rl_module(model_config={{"fcnet_hiddens": [8]}})
)
stop = {{"training_iteration": 4}}
checkpoint_freq = 0
checkpoint_minutes = 1e-6
"""


@pytest.mark.slow
def test_a_trial_begins_again_from_a_checkpoint_by_the_clock(ray_session, tmp_path, capsys):
    file, run = tmp_path / "sweep.py", tmp_path / "run"
    file.write_text(SWEEP.format(folder=str(tmp_path)))
    assert main(["train", "file", str(file), "--out", str(run), "--max-failures", "1"]) == 0
    assert (tmp_path / "failed").exists()
    trials = sorted((run / "tune").glob("*/result.json"))
    rows = [[json.loads(line) for line in t.read_text().splitlines()] for t in trials]
    assert [[row["training_iteration"] for row in r] for r in rows] == [[1, 2, 3, 4]] * 2
    again = [[row["iterations_since_restore"] for row in r] for r in rows]
    assert sorted(again) == [[1, 2, 1, 2], [1, 2, 3, 4]]  # it went on, rather than start anew
