"""However a model is spread over learners, the numbers are those of one."""

from __future__ import annotations

import copy

import pytest
import ray
import torch
from ray.rllib.core.learner.training_data import TrainingData

from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.errors import ConfigError
from tests.integration.test_learners import SPACES, config, episodes, weights  # noqa: F401

pytestmark = pytest.mark.usefixtures("kept_learners")
LEARNERS = pytest.mark.deepspeed  # where that package is, all strategies are tried side by side
STRATEGIES = [
    pytest.param({"strategy": "ddp"}, id="ddp"),
    pytest.param({"strategy": "fsdp2"}, id="fsdp2"),
    *(
        pytest.param(
            {"strategy": "deepspeed", "strategy_options": {"stage": stage}},
            id=f"zero{stage}",
        )
        for stage in (1, 2, 3)
    ),
]
UPDATES = 5


@pytest.fixture(scope="module")
def uneven(episodes):  # noqa: F811
    """Ragged groups; the last two cannot tell their members apart, and are dropped."""
    changed = copy.deepcopy(episodes)
    for episode in changed:
        trajectory = trajectory_of(episode)
        if trajectory.group_id >= 3:
            for turn in trajectory.turns:
                turn.rewards = {"accuracy": 0.0}
    return changed


def make_group(model, optimizer, learners, **strategy):
    setup = config(model, learners, optimizer, uniform_groups="drop").learners(
        num_learners=learners, **strategy
    )
    return setup.build_learner_group(rl_module_spec=setup.get_multi_rl_module_spec(spaces=SPACES))


def train(group, episodes, count):  # noqa: F811
    """Norms of gradients and losses; a second learner has only groups that are dropped."""
    norms, losses = [], []
    for _ in range(count):
        if group.is_local:
            results = group.update(training_data=TrainingData(episodes=list(episodes)))
        else:
            kept = [e for e in episodes if trajectory_of(e).group_id < 3]
            dropped = [e for e in episodes if trajectory_of(e).group_id >= 3]
            shards = [kept, dropped] if len(group) == 2 else [kept + dropped]
            results = group.update(episodes_refs=[ray.put(shard) for shard in shards])
        report = results[0]["default_policy"]
        norms.append(float(report["grad"]["norm"].peek()))
        losses.append(float(report["loss"].peek()))
    return norms, losses


@pytest.fixture(scope="module")
def alone(adder_model, uneven):
    """What one learner makes of it, by optimizer."""
    found = {}
    for optimizer in ("adamw", "sgd"):
        group = make_group(adder_model, optimizer, 0)
        start = weights(group)
        norms, losses = train(group, uneven, UPDATES)
        found[optimizer] = start, weights(group), norms, losses
        group.shutdown()
    return found


@LEARNERS
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_learners_equal_one(adder_model, uneven, alone, strategy, optimizer):
    start, single, single_norms, single_losses = alone[optimizer]
    group = make_group(adder_model, optimizer, 2, **strategy)
    begin = weights(group)
    assert begin.keys() == start.keys()
    assert all(torch.equal(start[k], begin[k]) for k in start)
    norms, losses = train(group, uneven, UPDATES)
    end = weights(group)
    group.shutdown()
    change = max((single[k] - start[k]).abs().max().item() for k in single)
    assert change > 1e-4
    assert max((single[k] - end[k]).abs().max().item() for k in single) <= 0.01 * change
    assert norms == pytest.approx(single_norms, rel=1e-4)
    assert losses == pytest.approx(single_losses, rel=1e-3, abs=1e-6)
    assert min(single_norms) > 0.05  # clipping was at work


@LEARNERS
@pytest.mark.parametrize(
    "strategy", [STRATEGIES[1], *(s for s in STRATEGIES if s.id in ("zero2", "zero3"))]
)
def test_weights_that_are_written_stay_written(adder_model, uneven, strategy):
    """A master copy that still held the old weights would put them back at the next step."""
    group = make_group(adder_model, "sgd", 2, **strategy)
    before = weights(group)
    train(group, uneven, 1)
    doubled = {k: v * 2 for k, v in before.items()}
    group.set_weights({"default_policy": doubled})
    assert all(torch.equal(v, doubled[k]) for k, v in weights(group).items())
    train(group, uneven, 1)
    moved = max((v - doubled[k]).abs().max().item() for k, v in weights(group).items())
    assert 0 < moved < 0.1
    group.shutdown()


@LEARNERS
@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s.id in ("zero2", "zero3")])
def test_buckets_are_no_larger_than_the_model(adder_model, strategy):
    """DeepSpeed's own are 2 GB, and touched at every step."""

    def sizes(learner):
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in learner._unwrapped.parameters())
        return learner._strategy._zero.reduce_bucket_size, parameters

    group = make_group(adder_model, "sgd", 2, **strategy)
    found = [result.get() for result in group.foreach_learner(sizes).result_or_errors]
    group.shutdown()
    assert all(bucket == parameters > 1000 for bucket, parameters in found)


@pytest.mark.parametrize(
    ("learners", "strategy", "message"),
    [
        (2, {"strategy": "single"}, "for one learner"),
        (1, {"strategy": "ddp"}, "2 or more"),
        (0, {"strategy": "fsdp2"}, "processes of their own"),
        (2, {"strategy": "fdsp2"}, "fsdp2"),
        (2, {"strategy": "fsdp2", "strategy_options": {"ofload": True}}, "offload"),
    ],
)
def test_a_strategy_that_cannot_be_is_refused(adder_model, learners, strategy, message):
    setup = config(adder_model, learners).learners(num_learners=learners, **strategy)
    with pytest.raises(ConfigError, match=message):
        setup.validate()


def test_a_strategy_without_its_package_says_so(adder_model, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "deepspeed" else find(name, *a),
    )
    setup = config(adder_model, 2).learners(strategy="deepspeed")
    with pytest.raises(ConfigError, match=r"rllib-gtpo\[deepspeed\]"):
        setup.validate()


ELASTIC = [
    pytest.param((2, {"strategy": "fsdp2"}), (0, {"strategy": "single"}), id="fsdp2-single"),
    pytest.param((0, {"strategy": "single"}), (2, {"strategy": "fsdp2"}), id="single-fsdp2"),
    pytest.param((2, {"strategy": "fsdp2"}), (1, {"strategy": "fsdp2"}), id="fsdp2-fewer"),
    pytest.param(
        (2, {"strategy": "deepspeed", "strategy_options": {"stage": 2}}),
        (2, {"strategy": "deepspeed", "strategy_options": {"stage": 2}}),
        id="zero2-zero2",
    ),
]


def build_algorithm(model, learners, strategy):
    setup = config(model, learners, uniform_groups="drop").learners(
        num_learners=learners, **strategy
    )
    return setup.build_algo()


@LEARNERS
@pytest.mark.parametrize(("before", "after"), ELASTIC)
def test_a_run_goes_on_with_another_strategy_as_if_nothing_had_been(
    adder_model, uneven, alone, tmp_path, before, after
):
    _, single, single_norms, single_losses = alone["adamw"]
    norms, losses = [], []
    for part, count in ((before, 2), (after, UPDATES - 2)):
        algorithm = build_algorithm(adder_model, *part)
        if norms:
            algorithm.restore_from_path(str(tmp_path / "checkpoint"))
        more = train(algorithm.learner_group, uneven, count)
        norms += more[0]
        losses += more[1]
        if part is before:
            algorithm.save_to_path(str(tmp_path / "checkpoint"))
        end = weights(algorithm.learner_group)
        algorithm.stop()
    assert norms == pytest.approx(single_norms, rel=1e-4)
    assert losses == pytest.approx(single_losses, rel=1e-3, abs=1e-6)
    assert max((single[k] - end[k]).abs().max().item() for k in single) <= 1e-4


@LEARNERS
def test_deepspeed_does_not_continue_from_another_number_of_learners(adder_model, tmp_path):
    zero = {"strategy": "deepspeed", "strategy_options": {"stage": 1}}
    algorithm = build_algorithm(adder_model, 2, zero)
    algorithm.save_to_path(str(tmp_path))
    algorithm.stop()
    other = build_algorithm(adder_model, 1, zero)
    with pytest.raises(ConfigError, match="deepspeed stage 1 on 2 learners"):
        other.restore_from_path(str(tmp_path))
    other.stop()


@LEARNERS
def test_the_reference_of_sliced_learners_is_the_same_and_is_saved(adder_model, uneven, tmp_path):
    ends = []
    for learners, strategy in ((0, {"strategy": "single"}), (2, {"strategy": "fsdp2"})):
        setup = config(adder_model, learners, uniform_groups="drop", kl_coeff=2.0)
        algorithm = setup.learners(num_learners=learners, **strategy).build_algo()
        made = weights(algorithm.learner_group)
        start = {k: v * 1.1 for k, v in made.items()}  # not what a new module has
        algorithm.learner_group.set_weights({"default_policy": start})
        train(algorithm.learner_group, uneven, 3)
        ends.append(weights(algorithm.learner_group))
        path = str(tmp_path / strategy["strategy"])
        algorithm.save_to_path(path)
        kept = algorithm.learner_group.get_state()["learner"]["reference"]
        assert kept.keys() == start.keys()
        assert all(torch.equal(kept[k], start[k]) for k in start)
        train(algorithm.learner_group, uneven, 1)
        algorithm.restore_from_path(path)
        again = algorithm.learner_group.get_state()["learner"]["reference"]
        assert all(torch.equal(again[k], start[k]) for k in start)
        algorithm.stop()
    change = max((ends[0][k] - start[k]).abs().max().item() for k in start)
    assert max((ends[0][k] - ends[1][k]).abs().max().item() for k in start) <= 0.01 * change
