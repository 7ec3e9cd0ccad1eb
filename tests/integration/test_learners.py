"""Two learners are one learner, for gradients, weights and metrics."""

from __future__ import annotations

import pytest
import ray
import torch
from ray.rllib.core.learner.training_data import TrainingData

from rllib_gtpo.env import ChatSpace
from rllib_gtpo.env_runner import GroupJob
from rllib_gtpo.episodes import groups_of
from rllib_gtpo.packing import shard_groups


@pytest.fixture(scope="module")
def episodes(adder_model):
    """Ragged groups, sampled once: all updates see the very same data."""
    algorithm = config(adder_model, 0).build_algo()
    jobs = [GroupJob(position, 4, 0) for position in range(5)]
    sampled = algorithm.env_runner.sample_groups(jobs).episodes
    algorithm.stop()
    return sampled


SPACES = {"default_policy": (ChatSpace(), ChatSpace())}
OPTIMIZERS = {
    "adamw": {"name": "AdamW", "weight_decay": 0.01},
    "sgd": {"name": "SGD"},
}


def config(model, learners, optimizer="adamw", **training):
    from rllib_gtpo import GTPOConfig
    from tests.tasks import Adder

    lr = 1e-3 if optimizer == "adamw" else 0.5
    settings = {"lr": lr, "grad_clip": 0.05, "token_budget": 512, "group_size": 4, **training}
    return (
        GTPOConfig()
        .environment(Adder)
        .language_model(model=model)
        .rollouts(max_turn_tokens=64)
        .training(optimizer=OPTIMIZERS[optimizer], groups_per_step=5, **settings)
        .learners(num_learners=learners)
        .reporting(progress=False)
        .debugging(seed=0)
    )


def updates(setup, episodes, count=3):
    """Weights before and after, and the gradient norms, of `count` updates on the same episodes."""
    group = setup.build_learner_group(rl_module_spec=setup.get_multi_rl_module_spec(spaces=SPACES))
    before = weights(group)
    norms, losses = [], []
    for _ in range(count):
        if setup.num_learners:
            owned = shard_groups(groups_of(episodes), setup.num_learners)
            ids = [{g.id for g in shard} for shard in owned]
            shards = [[e for e in episodes if groups_of([e])[0].id in shard] for shard in ids]
            results = group.update(episodes_refs=[ray.put(shard) for shard in shards])
        else:
            results = group.update(training_data=TrainingData(episodes=list(episodes)))
        report = results[0]["default_policy"]
        norms.append(float(report["grad"]["norm"].peek()))
        losses.append(float(report["loss"].peek()))
    after = weights(group)
    group.shutdown()
    return before, after, norms, losses


def weights(group):
    return group.get_state(components="learner/rl_module")["learner"]["rl_module"]["default_policy"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_two_learners_equal_one(adder_model, episodes, optimizer):
    start, one, norms_one, losses_one = updates(config(adder_model, 0, optimizer), episodes)
    begin, two, norms_two, losses_two = updates(config(adder_model, 2, optimizer), episodes)
    assert all(torch.equal(start[k], begin[k]) for k in start)
    change = max((one[k] - start[k]).abs().max().item() for k in one)
    difference = max((one[k] - two[k]).abs().max().item() for k in one)
    assert change > 1e-4
    assert difference <= 0.01 * change
    assert norms_two == pytest.approx(norms_one, rel=1e-4)
    assert losses_two == pytest.approx(losses_one, rel=1e-3, abs=1e-6)
    assert min(norms_one) > 0.05  # clipping was at work


def test_micro_batches_do_not_change_the_result(adder_model, episodes):
    _, large, norms_large, _ = updates(config(adder_model, 0, token_budget=100_000), episodes, 2)
    start, small, norms_small, _ = updates(config(adder_model, 0, token_budget=1), episodes, 2)
    change = max((large[k] - start[k]).abs().max().item() for k in large)
    assert max((large[k] - small[k]).abs().max().item() for k in large) <= 0.01 * change
    assert norms_small == pytest.approx(norms_large, rel=1e-4)


def test_mini_batches_are_steps_of_their_own(adder_model, episodes):
    _, once, _, _ = updates(config(adder_model, 0), episodes, 1)
    _, thrice, _, _ = updates(config(adder_model, 0, mini_batches=3, epochs=2), episodes, 1)
    assert max((once[k] - thrice[k]).abs().max().item() for k in once) > 1e-4


def test_kl_to_a_reference_pulls_back(adder_model, episodes):
    start, free, _, _ = updates(config(adder_model, 0, "sgd"), episodes, 6)
    _, held, _, _ = updates(config(adder_model, 0, "sgd", kl_coeff=5.0), episodes, 6)

    def moved(state):
        return sum((state[k] - start[k]).pow(2).sum().item() for k in state)

    assert 0 < moved(held) < moved(free)


def test_non_finite_gradients_leave_the_weights_alone(adder_model, episodes):
    setup = config(adder_model, 0)
    group = setup.build_learner_group(rl_module_spec=setup.get_multi_rl_module_spec(spaces=SPACES))
    before = weights(group)
    learner = group._learner
    head = learner._unwrapped.model.get_output_embeddings().weight
    hook = head.register_hook(lambda grad: grad * float("nan"))
    for _ in range(2):
        report = group.update(training_data=TrainingData(episodes=list(episodes)))[0]
        assert report["default_policy"]["grad"]["skipped"].peek() == 1.0
    assert all(torch.equal(v, weights(group)[k]) for k, v in before.items())
    hook.remove()
    report = group.update(training_data=TrainingData(episodes=list(episodes)))[0]
    assert report["default_policy"]["grad"]["skipped"].peek() == 0.0
    assert not all(torch.equal(v, weights(group)[k]) for k, v in before.items())


def test_weights_of_another_model_are_refused(adder_model):
    from rllib_gtpo.errors import ConfigError

    setup = config(adder_model, 0)
    module = setup.get_multi_rl_module_spec(spaces=SPACES).build()["default_policy"]
    state = module.get_state()
    name = next(iter(state))
    with pytest.raises(ConfigError, match="another model"):
        module.set_state({**state, name: state[name][:1]})
    with pytest.raises(ConfigError, match="does not exist here"):
        module.set_state({"nothing": state[name]})
