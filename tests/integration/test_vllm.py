"""GTPO on the calculator over two vLLM engines, one of which dies on the way."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from rllib_gtpo import GTPOConfig
from rllib_gtpo.rl_module import RemoteModule
from rllib_gtpo_envs import Calculator
from tests.engines.processes import core_of

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

GROUPS, MEMBERS = 4, 4


def killer(order):
    """A callback that kills the core of an engine once the file `order` names its actor."""

    def on_episode_step(**kwargs):
        try:
            taken = order.rename(order.with_suffix(".taken"))
        except FileNotFoundError:
            return
        os.kill(core_of(int(taken.read_text())), signal.SIGKILL)

    return on_episode_step


@pytest.fixture(scope="module")
def order(tmp_path_factory):
    return tmp_path_factory.mktemp("kill") / "pid"


@pytest.fixture(scope="module")
def algorithm(ray_session, order):
    config = (
        GTPOConfig()
        .environment(Calculator)
        .language_model(
            call_format="fenced",
            cold_start={"data": "expert", "steps": 100, "batch_size": 16, "lr": 4e-3},
        )
        .rollouts(engine="vllm", num_engines=2, max_turn_tokens=24, max_tokens=400)
        .training(lr=1e-3, group_size=MEMBERS, groups_per_step=GROUPS)
        .evaluation(evaluation_interval=100, evaluation_duration=8)
        .reporting(progress=False)
        .env_runners(num_env_runners=1)
        .callbacks(on_episode_step=killer(order))
        .debugging(seed=1)
    )
    made = config.build_algo()
    yield made
    made.stop()
    assert made.engines is None


def weights(algorithm):
    learned = algorithm.learner_group.get_weights()["default_policy"]
    return torch.cat([v.flatten() for v in learned.values()])


def test_it_samples_with_the_weights_that_it_learns(algorithm):
    assert isinstance(algorithm.env_runner.module, RemoteModule)
    assert not list(algorithm.env_runner.module.parameters())
    before = weights(algorithm)
    for iteration in range(2):
        result = algorithm.train()
        assert result["group"]["kept"] == GROUPS
        assert result["turn"]["per_trajectory"] > 1  # it calls its tool
        # The sampler's log-probabilities are the learner's: else the weights are not in sync.
        assert abs(result["mismatch"]["kl"]) < 1e-6, iteration
        assert set(result["weights"].values()) == {0.0}  # neither stale nor spanning
    assert not torch.equal(before, weights(algorithm))
    report = algorithm.engines.report()
    assert report.serving == 2
    assert (
        report.version
        == algorithm.learner_group.foreach_learner(lambda learner: learner._weights_seq_no)
        .result_or_errors[0]
        .get()
    )


def test_evaluation_shares_the_engines(algorithm):
    assert 0.0 <= algorithm.evaluate()["accuracy"] <= 1.0


def test_a_killed_engine_costs_no_group(algorithm, order):
    before = algorithm.engines.report()
    order.with_suffix(".new").write_text(str(before.engines[0].pid))
    order.with_suffix(".new").rename(order)
    result = algorithm.train()
    assert not order.exists()
    assert result["group"]["kept"] == GROUPS
    assert result["group"]["incomplete"] == 0
    assert result["trajectory"]["discarded"] == 0
    assert abs(result["mismatch"]["kl"]) < 1e-6
    deadline = time.monotonic() + 250
    while algorithm.engines.report().serving < 2 and time.monotonic() < deadline:
        time.sleep(1)
    report = algorithm.engines.report()
    assert (report.serving, report.replaced) == (2, before.replaced + 1)
    assert abs(algorithm.train()["mismatch"]["kl"]) < 1e-6  # the new one is in sync


def test_a_restored_run_samples_with_restored_weights(algorithm, tmp_path):
    algorithm.save_to_path(str(tmp_path / "checkpoint"))
    saved = weights(algorithm)
    algorithm.train()
    algorithm.restore_from_path(str(tmp_path / "checkpoint"))
    assert torch.equal(saved, weights(algorithm))
    assert abs(algorithm.train()["mismatch"]["kl"]) < 1e-6
