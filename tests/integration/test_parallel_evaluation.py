"""Evaluation while training goes on: that it does, of which weights, and what does not go."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path

import pytest
from ray.rllib.callbacks.callbacks import RLlibCallback

from rllib_gtpo import GTPOConfig
from rllib_gtpo.cli import main
from rllib_gtpo.errors import ConfigError, Interrupted
from rllib_gtpo.metrics import nested
from tests.tasks import Adder


class Meet(RLlibCallback):
    """Training and evaluation wait for each other's first episode: in vain, if one of both only
    starts when the other is over."""

    def on_episode_step(self, *, env_runner, **kwargs):
        if not env_runner.config.in_evaluation:
            time.sleep(env_runner.config.env_config.get("nap", 0))

    def on_episode_end(self, *, env_runner, **kwargs):
        folder = env_runner.config.env_config.get("meet")
        evaluates = env_runner.config.in_evaluation
        if folder is None:
            return
        own, other = ("b", "a") if evaluates else ("a", "b")
        Path(folder, own).touch()
        deadline = time.monotonic() + 60
        while not Path(folder, other).exists():
            assert time.monotonic() < deadline, "nobody came"
            time.sleep(0.01)


def configured(model, parallel, env_config):
    return (
        GTPOConfig()
        .environment(Adder, env_config=env_config)
        .language_model(model=model)
        .rollouts(max_turn_tokens=64)
        .training(lr=3e-3, group_size=4, groups_per_step=4)
        .evaluation(
            evaluation_interval=1,
            evaluation_num_env_runners=1,
            evaluation_parallel_to_training=parallel,
            evaluation_duration=24,
            samples_per_task=2,
        )
        .callbacks(Meet)
        .reporting(progress=False)
        .debugging(seed=3, deterministic=True)
    )


def trained(*settings):
    """The results of each iteration, and what training was behind the last evaluation."""
    algorithm = configured(*settings).build_algo()
    results = [algorithm.train() for _ in range(3)]
    evaluated = algorithm._evaluated
    algorithm.stop()
    return results, evaluated


@pytest.fixture(scope="module")
def runs(adder_model, tmp_path_factory):
    """Parallel, so that both meet, and one after the other."""
    meet = {"meet": str(tmp_path_factory.mktemp("meet"))}
    return {True: trained(adder_model, True, meet), False: trained(adder_model, False, {})}


def own(evaluation):
    """Without RLlib's part, in which there are times."""
    names = ("env_runners", "num_", "actor_manager")
    return {k: v for k, v in nested(evaluation).items() if not k.startswith(names)}


def test_each_evaluation_is_of_the_weights_that_its_iteration_starts_with(runs):
    """So it is, bit for bit, what a run that evaluates in between says one iteration earlier."""
    (parallel, evaluated), (serial, _) = runs[True], runs[False]
    for before, now in zip(serial, parallel[1:], strict=False):
        assert own(now["evaluation"]) == own(before["evaluation"])
    versions = [result["evaluation"]["weights"]["version"] for result in parallel]
    assert versions == [0, 1, 2]
    accuracies = {str(own(result["evaluation"])) for result in parallel}
    assert len(accuracies) == 3  # else nothing would tell the weights apart
    # What training says is the same in both, so the weights are: evaluation changes nothing.
    for one, other in zip(parallel, serial, strict=True):
        for name in ("accuracy", "loss", "policy", "reward", "turn", "trajectory"):
            assert one[name] == other[name], name
    # The accuracy after training is not taken from an evaluation of older weights.
    assert evaluated[0][1] < parallel[-1]["tokens"]["sampled_lifetime"]


def test_its_timers_are_numbers(runs):
    """Also those that have not ended when the iteration has."""
    for result in runs[True][0]:
        assert not any(map(math.isnan, result["timers"].values()))


def test_a_stop_leaves_both(adder_model):
    """In the middle of the training's rollouts; then it goes on as if nothing had been."""
    algorithm = configured(adder_model, True, {"nap": 0.1}).build_algo()
    timer = threading.Timer(0.5, algorithm.request_stop)
    timer.start()
    with pytest.raises(Interrupted):
        algorithm.train()
    algorithm.config.env_config["nap"] = 0
    result = algorithm.train()
    algorithm.stop()
    assert result["evaluation"]["weights"]["version"] == 0
    assert result["training_iteration"] == 1 and result["tokens"]["sampled"] > 0


def test_a_run_with_a_cold_start_shows_it(adder_model, tmp_path, capsys):
    """By the command: results, events and report have the evaluation of each iteration."""
    file = tmp_path / "parallel.py"
    file.write_text(
        "from rllib_gtpo import GTPOConfig\n"
        "from tests.tasks import Adder\n"
        "config = (GTPOConfig().environment(Adder)\n"
        f"    .language_model(model={adder_model!r}, cold_start={{'steps': 2, 'batch_size': 4}})\n"
        "    .rollouts(max_turn_tokens=64)\n"
        "    .training(lr=1e-3, group_size=2, groups_per_step=2)\n"
        "    .evaluation(evaluation_interval=2, evaluation_num_env_runners=1,\n"
        "                evaluation_parallel_to_training=True, evaluation_duration=8)\n"
        "    .reporting(progress=False).debugging(seed=1))\n"
        "stop = {'training_iteration': 4}\n"
    )
    run = tmp_path / "run"
    assert main(["train", "file", str(file), "--out", str(run)]) == 0
    rows = [json.loads(line) for line in (run / "result.json").read_text().splitlines()]
    assert ["evaluation" in row for row in rows] == [False, True, False, True]
    assert [row["evaluation"]["weights"]["version"] for row in rows[1::2]] == [
        2,
        4,
    ]  # 1: cold start
    assert main(["report", str(run), "--terminal"]) == 0
    assert "Held-out accuracy" in capsys.readouterr().out
    before, after = json.loads((run / "run.json").read_text())["held_out_accuracy"]
    assert 0 <= before <= 1 and 0 <= after <= 1


def own_evaluation(algorithm, runners):
    return {}, 0, 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.env_runners(create_local_env_runner=False), "that is restarted gets"),
        (
            lambda c: c.evaluation(custom_evaluation_function=own_evaluation),
            "would not know that it is to train",
        ),
        (lambda c: c.evaluation(evaluation_num_env_runners=0), "evaluation_num_env_runners` > 0"),
    ],
)
def test_what_does_not_go_with_it(change, message):
    config = GTPOConfig().evaluation(
        evaluation_interval=1, evaluation_num_env_runners=1, evaluation_parallel_to_training=True
    )
    config.validate()
    with pytest.raises((ConfigError, ValueError), match=message):
        change(config).validate()


def test_nor_does_vllm(monkeypatch):
    """Whether it is installed or not."""
    monkeypatch.setattr("rllib_gtpo.checks.check_vllm", lambda config: None)
    config = GTPOConfig().rollouts(engine="vllm")
    config.evaluation(evaluation_num_env_runners=1, evaluation_parallel_to_training=True)
    with pytest.raises(ConfigError, match="engines are those of the training"):
        config.validate()
