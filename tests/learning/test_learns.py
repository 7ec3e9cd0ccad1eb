"""GTPO learns, and it is the credit that does it: without it, or with a wrong one, nothing is
learned.

One cold start, then four runs from it: as it should be, and with advantages zeroed, shuffled over
all turns of the step, and with their sign flipped.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rllib_gtpo import GTPOConfig
from rllib_gtpo.connectors import learner as learner_connectors
from rllib_gtpo_envs import Calculator

pytestmark = [pytest.mark.learning, pytest.mark.timeout(600)]

ITERATIONS = 15
MARGIN = 0.25  # what learning must add to held-out accuracy; 0.4 to 0.6 is usual


def config():
    return (
        GTPOConfig()
        .environment(Calculator, env_config={"operations": [2, 2], "train": 4000})
        .language_model(
            call_format="fenced",
            cold_start={"data": "expert", "steps": 600, "batch_size": 24, "lr": 2e-3},
        )
        .rollouts(max_turn_tokens=24)
        .training(lr=3e-4, group_size=8, groups_per_step=8)
        .evaluation(evaluation_interval=ITERATIONS, evaluation_duration=256, split="test")
        .reporting(progress=False)
        .debugging(seed=0, deterministic=True)
    )


@pytest.fixture(scope="module")
def cold_started(ray_session, tmp_path_factory):
    """A checkpoint behind the cold start, and its held-out accuracy."""
    algorithm = config().build_algo()
    accuracy = algorithm.evaluate()["accuracy"]
    path = algorithm.save_to_path(str(tmp_path_factory.mktemp("cold")))
    algorithm.stop()
    return path, accuracy


def train(path):
    algorithm = config().build_algo()
    algorithm.restore_from_path(path)
    for _ in range(ITERATIONS):
        result = algorithm.train()
    algorithm.stop()
    return result["evaluation"]["accuracy"]


@pytest.fixture
def distorted(monkeypatch):
    """Lets a test change the advantages between the estimator and the loss."""

    def distort(change):
        original = learner_connectors.turn_credit

        def changed(*args, **kwargs):
            credit = original(*args, **kwargs)
            return replace(credit, advantages=change(credit.advantages))

        monkeypatch.setattr(learner_connectors, "turn_credit", changed)

    return distort


def test_gtpo_lifts_held_out_accuracy(cold_started):
    path, before = cold_started
    assert 0.2 < before < 0.6
    assert train(path) > before + MARGIN


@pytest.mark.parametrize("wrong", ["zeroed", "shuffled", "flipped"])
def test_wrong_credit_does_not(cold_started, distorted, wrong):
    path, before = cold_started
    generator = torch.Generator().manual_seed(0)
    distorted(
        {
            "zeroed": torch.zeros_like,
            "shuffled": lambda a: a[torch.randperm(len(a), generator=generator)],
            "flipped": torch.neg,
        }[wrong]
    )
    assert not train(path) > before + MARGIN
