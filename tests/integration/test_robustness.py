"""What a learner does with bad numbers, other models' weights, and rows that are too long."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import yaml
from ray.rllib.core.learner.training_data import TrainingData

from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.errors import ConfigError, GTPOError
from rllib_gtpo.models import TINY_QWEN2
from rllib_gtpo.sequence_learner import MAX_BAD_STEPS
from tests.integration.test_learners import SPACES, config, episodes, updates, weights  # noqa: F401
from tests.integration.test_strategies import (
    LEARNERS,
    STRATEGIES,
    train,
    uneven,  # noqa: F401
)


def local_group(setup):
    return setup.build_learner_group(rl_module_spec=setup.get_multi_rl_module_spec(spaces=SPACES))


def update(group, episodes):  # noqa: F811
    return group.update(training_data=TrainingData(episodes=list(episodes)))[0]["default_policy"]


def spoil(learner):
    """From now on the first learner's gradients are not finite, and its loss is."""
    if learner._rank == 0:

        def forward(module, args, output):
            output.last_hidden_state.register_hook(lambda gradient: gradient * float("inf"))

        learner.spoilt = learner._unwrapped.model.get_decoder().register_forward_hook(forward)


def mend(learner):
    if learner._rank == 0:
        learner.spoilt.remove()


def moments(learner):
    """What the policy's optimizer keeps, here."""
    optimizer = learner.get_optimizer("default_policy", "policy")
    kept = [v for state in optimizer.state.values() for v in state.values()]
    tensors = [getattr(v, "to_local", lambda v=v: v)() for v in kept if isinstance(v, torch.Tensor)]
    return [tensor.detach().cpu().clone() for tensor in tensors]


def everywhere(group, function):
    return [result.get() for result in group.foreach_learner(function)]


SPOILT = [
    pytest.param({"strategy": "single"}, "float32", id="single"),
    *(pytest.param(*s.values, "float32", id=s.id) for s in STRATEGIES if s.id != "zero1"),
    *(pytest.param(*s.values, "bfloat16", id=f"{s.id}-bfloat16") for s in STRATEGIES[:3]),
]


@LEARNERS
@pytest.mark.parametrize(("strategy", "dtype"), SPOILT)
def test_gradients_that_are_not_finite_change_neither_weights_nor_moments(
    adder_model,
    uneven,  # noqa: F811
    strategy,
    dtype,
):
    learners = 0 if strategy["strategy"] == "single" else 2
    setup = config(adder_model, learners, uniform_groups="drop").learners(**strategy)
    group = local_group(setup.language_model(dtype=dtype))
    train(group, uneven, 1)
    before, kept = weights(group), everywhere(group, moments)
    assert all(torch.isfinite(v).all() for v in before.values()) and any(kept)
    everywhere(group, spoil)
    norms, losses = train(group, uneven, 2)
    assert not any(torch.isfinite(torch.tensor(norms)))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert all(torch.equal(v, before[k]) for k, v in weights(group).items())
    for now, then in zip(everywhere(group, moments), kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, then, strict=True))
    everywhere(group, mend)
    norms, _ = train(group, uneven, 1)
    assert norms[0] > 0.0
    assert not all(torch.equal(v, before[k]) for k, v in weights(group).items())
    group.shutdown()


def test_training_stops_when_no_gradient_is_finite(adder_model, episodes):  # noqa: F811
    group = local_group(config(adder_model, 0))
    before = weights(group)
    group.foreach_learner(spoil)
    for _ in range(MAX_BAD_STEPS - 1):
        assert update(group, episodes)["grad"]["skipped"].peek() == 1.0
    with pytest.raises(GTPOError, match="the weights are those before the first"):
        update(group, episodes)
    assert all(torch.equal(v, before[k]) for k, v in weights(group).items())


def test_a_checkpoint_of_another_model_changes_nothing(adder_model, tmp_path):
    made = []
    for size in (64, 128):
        setup = config({**TINY_QWEN2, "hidden_size": size, "num_hidden_layers": 1}, 0)
        made.append(setup.build_algo())
    small, large = made
    small.save_to_path(str(tmp_path))
    before = large.learner_group.get_state()["learner"]
    with pytest.raises(ConfigError, match=r"another model: .* nothing was loaded"):
        large.restore_from_path(str(tmp_path))
    after = large.learner_group.get_state()["learner"]
    assert after["weights_seq_no"] == before["weights_seq_no"]
    weights_before = before["rl_module"]["default_policy"]
    weights_after = after["rl_module"]["default_policy"]
    assert all(torch.equal(v, weights_after[k]) for k, v in weights_before.items())
    for algorithm in made:
        algorithm.stop()


def test_rows_longer_than_the_budget_are_counted_and_said_once(
    adder_model,
    episodes,  # noqa: F811
    caplog,
):
    lengths = [
        sum(len(t.prompt_ids) + len(t.token_ids) for t in trajectory_of(e).turns) for e in episodes
    ]
    budget = sorted(lengths)[-3]
    group = local_group(config(adder_model, 0, token_budget=budget))
    with caplog.at_level(logging.WARNING, logger="rllib_gtpo"):
        reports = [update(group, episodes) for _ in range(2)]
    over = sum(length > budget for length in lengths)
    assert over > 0
    assert [report["packing"]["over_budget"].peek() for report in reports] == [over, over]
    said = [r.getMessage() for r in caplog.records if "token_budget" in r.getMessage()]
    assert len(said) == 1
    assert f"rollouts(max_tokens={budget})" in said[0]


def test_mini_batches_are_even_whatever_was_dropped(adder_model, episodes):  # noqa: F811
    changed = copy.deepcopy(episodes)
    for episode in changed:
        if trajectory_of(episode).group_id in (1, 3):
            for turn in trajectory_of(episode).turns:
                turn.rewards = {"accuracy": 0.0}
    group = local_group(config(adder_model, 0, mini_batches=3, uniform_groups="drop"))
    steps = []
    learner = group._learner
    step = learner._step
    learner._step = lambda sequences, chosen, *rest: (
        steps.append(chosen),
        step(sequences, chosen, *rest),
    )[1]
    update(group, changed)
    assert [len(chosen) for chosen in steps] == [4, 4, 4]  # of groups 0, 2 and 4
    assert sorted(i for chosen in steps for i in chosen) == list(range(12))


def test_mini_batches_of_two_learners_are_those_of_one(adder_model, episodes):  # noqa: F811
    settings = {"mini_batches": 2, "epochs": 2}
    start, one, _, _ = updates(config(adder_model, 0, "sgd", **settings), episodes, 1)
    _, two, _, _ = updates(config(adder_model, 2, "sgd", **settings), episodes, 1)
    change = max((one[k] - start[k]).abs().max().item() for k in one)
    assert max((one[k] - two[k]).abs().max().item() for k in one) <= 0.01 * change


YAML = """
lr: 0.001
lr_schedule: {warmup: 2, decay: linear, iterations: 6}
"""


def test_a_learning_rate_warms_up_and_decays_also_over_a_resumed_run(
    adder_model,
    episodes,  # noqa: F811
    tmp_path,
):
    fluent = config(adder_model, 0).training(
        lr_schedule={"warmup": 2, "decay": "linear", "iterations": 6}
    )
    of_file = config(adder_model, 0).update_from_dict(yaml.safe_load(YAML))
    expected = [0.0005, 0.001, 0.001, 0.00075, 0.0005, 0.00025, 0.0]
    seen = []
    algorithm = fluent.build_algo()
    seen += [update(algorithm.learner_group, episodes)["lr"].peek() for _ in range(3)]
    algorithm.save_to_path(str(tmp_path))
    algorithm.stop()
    algorithm = of_file.build_algo()
    algorithm.restore_from_path(str(tmp_path))
    seen += [update(algorithm.learner_group, episodes)["lr"].peek() for _ in range(4)]
    algorithm.stop()
    assert seen == pytest.approx(expected)


def test_rllibs_own_list_of_learning_rates_goes_by_turns_one_update_behind(adder_model, episodes):  # noqa: F811
    from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

    group = local_group(config(adder_model, 0, lr=[[0, 1e-3], [100, 1e-4]]))
    data = TrainingData(episodes=list(episodes))
    seen = []
    for turns in (0, 50, 200):  # of which RLlib takes note after the update
        timesteps = {NUM_ENV_STEPS_SAMPLED_LIFETIME: turns}
        report = group.update(training_data=copy.copy(data), timesteps=timesteps)[0]
        seen.append(report["default_policy"]["lr"].peek())
    assert seen == pytest.approx([1e-3, 1e-3, 5.5e-4])
