"""bfloat16 with float32 master weights, and activations that are computed again."""

from __future__ import annotations

import shutil

import pytest
import torch
from ray.rllib.core.learner.training_data import TrainingData

from rllib_gtpo.models import load_model, load_tokenizer
from tests.integration.test_learners import SPACES, config, episodes, updates, weights  # noqa: F401
from tests.integration.test_strategies import LEARNERS, STRATEGIES, train, uneven  # noqa: F401


@pytest.fixture(scope="module")
def rounded_model(adder_model, tmp_path_factory):
    """Weights that bfloat16 can hold, as in most published models."""
    directory = tmp_path_factory.mktemp("rounded")
    load_model(adder_model, dtype="bfloat16").save_pretrained(directory)
    load_tokenizer(adder_model).save_pretrained(directory)
    return str(directory)


LR = 1e-6  # of Adam: every weight moves by about as much in a step


def in_bfloat16(model, learners=0, strategy=None, **training):
    setup = config(model, learners, **{"lr": LR, **training}).language_model(dtype="bfloat16")
    return setup.learners(**(strategy or {}))


def local_group(setup):
    return setup.build_learner_group(rl_module_spec=setup.get_multi_rl_module_spec(spaces=SPACES))


def for_engines(group):
    state = group.get_state(components="learner/rl_module", inference_only=True)
    return state["learner"]["rl_module"]["default_policy"]


def update(group, episodes):  # noqa: F811
    return group.update(training_data=TrainingData(episodes=list(episodes)))[0]["default_policy"]


def test_updates_that_bfloat16_would_lose_are_kept(adder_model, episodes):  # noqa: F811
    group = local_group(in_bfloat16(adder_model))
    before, sampled_with = weights(group), for_engines(group)
    for _ in range(3):
        update(group, episodes)
    after, served = weights(group), for_engines(group)
    group.shutdown()
    assert {value.dtype for value in served.values()} == {torch.bfloat16}
    for name, value in after.items():
        assert value.dtype == torch.float32
        assert torch.equal(served[name], value.bfloat16())  # what engines get is the rounded master
    moved = torch.cat([(after[k] - before[k]).abs().flatten() for k in after])
    touched = moved > 0
    assert touched.float().mean() > 0.5
    assert moved[touched].median() == pytest.approx(3 * LR, rel=0.7)
    # The same steps on bfloat16 weights would have gone nowhere.
    lost = torch.cat([(sampled_with[k] - LR == sampled_with[k]).flatten() for k in after])
    assert lost.float().mean() > 0.9


def test_a_resumed_bfloat16_run_goes_on_exactly(adder_model, episodes, tmp_path):  # noqa: F811
    setup = in_bfloat16(adder_model)
    first = setup.build_algo()
    update(first.learner_group, episodes)
    first.save_to_path(str(tmp_path))
    update(first.learner_group, episodes)
    expected = weights(first.learner_group)
    first.stop()
    second = setup.copy(copy_frozen=False).build_algo()
    second.restore_from_path(str(tmp_path))
    update(second.learner_group, episodes)
    found = weights(second.learner_group)
    sampled_with = second.env_runner.module.get_state()
    second.stop()
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    assert {value.dtype for value in sampled_with.values()} == {torch.bfloat16}


def test_two_bfloat16_learners_equal_one(adder_model, episodes):  # noqa: F811
    sgd = {"optimizer": "sgd", "lr": 0.5}
    start, one, norms_one, _ = updates(in_bfloat16(adder_model, 0, **sgd), episodes)
    _, two, norms_two, _ = updates(in_bfloat16(adder_model, 2, **sgd), episodes)
    change = max((one[k] - start[k]).abs().max().item() for k in one)
    assert max((one[k] - two[k]).abs().max().item() for k in one) <= 0.1 * change
    assert norms_two == pytest.approx(norms_one, rel=0.02)


@LEARNERS
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_keeps_small_updates_under_every_strategy(
    rounded_model,
    uneven,  # noqa: F811
    tmp_path,
    strategy,
):
    """Saved and restored in the middle: what is below bfloat16's resolution must be in there."""

    def learners():
        return in_bfloat16(rounded_model, 2, strategy, uniform_groups="drop").build_algo()

    single = in_bfloat16(rounded_model, 0, uniform_groups="drop").build_algo()
    norms, _ = train(single.learner_group, uneven, 4)
    rounded = for_engines(single.learner_group)
    start = config(rounded_model, 0).get_multi_rl_module_spec(spaces=SPACES).build()
    start = start["default_policy"].get_state()
    single.stop()
    first = learners()
    before, _ = train(first.learner_group, uneven, 2)
    first.save_to_path(str(tmp_path))
    first.stop()
    second = learners()
    second.restore_from_path(str(tmp_path))
    after, _ = train(second.learner_group, uneven, 2)
    served = for_engines(second.learner_group)
    frequencies = second.learner_group.foreach_learner(
        lambda learner: {b.dtype for b in learner._unwrapped.buffers() if b.is_floating_point()}
    )
    second.stop()
    assert before + after == pytest.approx(norms, rel=0.03)
    assert {value.dtype for value in served.values()} == {torch.bfloat16}
    assert all(found.get() == {torch.float32} for found in frequencies)
    # Few weights cross a bfloat16 boundary within 4e-6; those that do must cross it in both.
    crossed = torch.cat([(rounded[k] != start[k].bfloat16()).flatten() for k in start])
    same = torch.cat([(rounded[k] == served[k]).flatten() for k in start])
    assert crossed.float().mean() > 1e-3
    assert (~same).sum() < 0.2 * crossed.sum()


@LEARNERS
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.id in ("ddp", "fsdp2", "zero3")])
def test_recomputed_activations_change_nothing_under_any_strategy(adder_model, uneven, strategy):  # noqa: F811
    single = local_group(config(adder_model, 0, "sgd", uniform_groups="drop"))
    start = weights(single)
    norms, _ = train(single, uneven, 2)
    expected = weights(single)
    setup = config(adder_model, 2, "sgd", uniform_groups="drop")
    group = local_group(setup.learners(activation_checkpointing=True, **strategy))
    again, _ = train(group, uneven, 2)
    found = weights(group)
    group.shutdown()
    change = max((expected[k] - start[k]).abs().max().item() for k in start)
    assert max((expected[k] - found[k]).abs().max().item() for k in start) <= 0.01 * change
    assert again == pytest.approx(norms, rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_learner_is_the_same_learner(adder_model, episodes):  # noqa: F811
    start, plain, norms, _ = updates(config(adder_model, 0, "sgd"), episodes, 2)
    setup = config(adder_model, 0, "sgd").learners(torch_compile=True)
    _, compiled, again, _ = updates(setup, episodes, 2)
    change = max((plain[k] - start[k]).abs().max().item() for k in start)
    assert max((plain[k] - compiled[k]).abs().max().item() for k in start) <= 0.01 * change
    assert again == pytest.approx(norms, rel=1e-4)
