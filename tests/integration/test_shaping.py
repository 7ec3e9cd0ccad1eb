"""Shaping in whole training steps: who gets it, and what a failing embedder does to a run."""

from __future__ import annotations

import os

import pytest

from rllib_gtpo.errors import EmbedderError
from tests.rewards.bedrock import Bedrock, error
from tests.tasks import Adder

AWS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


class WithKeys(Adder):
    """Brings fake credentials to remote runners, too."""

    def __init__(self, env_config=None):
        super().__init__(env_config)
        os.environ.update(AWS)


@pytest.fixture
def bedrock(monkeypatch):
    """A local Bedrock to which credentials have expired in the middle: some texts are refused."""
    for name, value in AWS.items():
        monkeypatch.setenv(name, value)
    server = Bedrock(lambda text, n: error("ExpiredTokenException", 403) if "7" in text else None)
    yield server
    server.close()


@pytest.fixture
def build(adder_config):
    """Builds algorithms that compare whole trajectories: the Adder's calls hold no code."""
    built = []

    def make(runners=0, **rewards):
        config = adder_config(groups_per_step=8).environment(WithKeys)
        config.rewards(**{"shaping": "mean", "shaping_input": "trajectory", **rewards})
        built.append(config.env_runners(num_env_runners=runners).build_algo())
        return built[-1]

    yield make
    for algorithm in built:
        algorithm.stop()


def titan(server, policy):
    return {
        "embedder": {"name": "titan", "region": "us-east-1", "endpoint_url": server.url},
        "on_embedder_failure": policy,
    }


def trained_groups(algorithm):
    return algorithm.learner_group._learner.last_batch.groups


def test_failed_members_of_mixed_groups_get_it_and_nobody_else(build):
    algorithm = build(shaping_alpha=0.4)
    result = algorithm.train()
    shaped, others = [], []
    for group in trained_groups(algorithm):
        mixed = any(t.correct for t in group.trajectories)
        for t in group.trajectories:
            side = shaped if mixed and not t.correct else others
            side.append(t.turns[-1].rewards["shaping"])
    assert any(shaped) and all(0.0 <= value <= 0.4 for value in shaped)
    assert others and not any(others)
    mean = sum(shaped) / (len(shaped) + len(others))
    assert result["reward"]["shaping"] == pytest.approx(mean)
    assert result["env_runners"]["unshaped_groups"] == 0


def test_the_returns_that_are_trained_on_hold_it(build):
    algorithm = build()
    algorithm.train()
    batch = algorithm.learner_group._learner.last_batch
    returns = iter(batch.credit.returns.tolist())
    ends = [
        (turn, value)
        for t in batch.trajectories
        for turn, value in zip(t.turns, returns, strict=False)
        if turn is t.turns[-1]
    ]
    assert any(turn.rewards["shaping"] > 0.0 for turn, _ in ends)
    assert [turn.reward for turn, _ in ends] == pytest.approx([value for _, value in ends])


def test_evaluation_is_not_shaped(adder_config):
    config = adder_config().rewards(shaping="mean", shaping_input="trajectory")
    algorithm = config.evaluation(evaluation_interval=1, evaluation_duration=8).build_algo()
    assert "shaping" not in algorithm.evaluate()["reward"]
    algorithm.stop()


@pytest.mark.parametrize("runners", [0, 2])
def test_stop_ends_the_training_with_the_cause_and_the_remedy(build, bedrock, runners):
    algorithm = build(runners, **titan(bedrock, "stop"))
    with pytest.raises(EmbedderError) as raised:
        algorithm.train()
    message = str(raised.value)
    assert "texts could not be embedded for shaping" in message
    assert "ExpiredTokenException" in message and "renew the AWS credentials" in message
    assert "on_embedder_failure='skip'" in message


@pytest.mark.parametrize("runners", [0, 2])
def test_skip_goes_on_and_counts(build, bedrock, runners):
    algorithm = build(runners, **titan(bedrock, "skip"))
    result = algorithm.train()
    groups = trained_groups(algorithm)
    with_it = [["shaping" in t.turns[-1].rewards for t in g.trajectories] for g in groups]
    unshaped = [members for members in with_it if not all(members)]
    assert 0 < len(unshaped) < len(groups)
    assert not any(map(any, unshaped))
    assert result["env_runners"]["unshaped_groups"] == len(unshaped)
    assert algorithm.train()["grad"]["norm"] > 0
