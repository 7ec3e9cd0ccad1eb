"""LoRA: the adapter is trained, moved and kept, its base is not; two learners are one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.lora import BASE_MARK
from rllib_gtpo.packing import NOT_TRAINED, TokenSequence
from tests.integration.test_learners import SPACES, config, episodes, weights  # noqa: F401
from tests.integration.test_strategies import STRATEGIES, train, uneven  # noqa: F401

pytestmark = pytest.mark.usefixtures("kept_learners")
LORA = {"rank": 4, "alpha": 16}
UPDATES = 4
SMALL = json.dumps(
    {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
    }
)


def lora_config(model, learners=0, optimizer="adamw", lora=LORA, **training):
    made = config(model, learners, optimizer, uniform_groups="drop", **training)
    if optimizer == "adamw":
        made.training(lr=1e-2)
    return made.language_model(lora=lora)


def make_group(setup):
    return setup.build_learner_group(rl_module_spec=setup.get_multi_rl_module_spec(spaces=SPACES))


def base_of(group):
    """The weights that are not to be trained, as the first learner holds them."""

    def read(learner):
        module = learner._unwrapped
        return {
            name: (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
            for name, value in module.state_dict().items()
            if name not in module.adapter_names
        }

    return group.foreach_learner(read).result_or_errors[0].get()


def changes(before, after):
    return max((after[k].float() - before[k].float()).abs().max().item() for k in before)


@pytest.fixture(scope="module")
def alone(adder_model, uneven):  # noqa: F811
    """What one learner makes of it, by optimizer and weight of the KL term."""
    found = {}
    for optimizer, kl in (("adamw", 0.0), ("sgd", 0.0), ("adamw", 2.0)):
        group = make_group(lora_config(adder_model, 0, optimizer, kl_coeff=kl))
        start, base = weights(group), base_of(group)
        norms, losses = train(group, uneven, UPDATES)
        assert all(torch.equal(base[k], v) for k, v in base_of(group).items())
        found[optimizer, kl] = start, weights(group), norms, losses
        group.shutdown()
    return found


def compare(setup, uneven, expected):  # noqa: F811
    start, single, single_norms, single_losses = expected
    group = make_group(setup)
    begin = weights(group)
    assert begin.keys() == start.keys()
    assert all(torch.equal(start[k], begin[k]) for k in start)
    norms, losses = train(group, uneven, UPDATES)
    end = weights(group)
    group.shutdown()
    change = changes(start, single)
    assert change > 1e-3
    assert changes(single, end) <= 0.01 * change
    assert norms == pytest.approx(single_norms, rel=1e-4)
    assert losses == pytest.approx(single_losses, rel=1e-3, abs=1e-6)


def test_two_learners_equal_one(adder_model, uneven, alone):  # noqa: F811
    compare(lora_config(adder_model, 2), uneven, alone["adamw", 0.0])


@pytest.mark.deepspeed
@pytest.mark.parametrize(("optimizer", "kl"), [("sgd", 0.0), ("adamw", 2.0)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_learners_of_any_strategy_equal_one(
    adder_model,
    uneven,  # noqa: F811
    alone,
    strategy,
    optimizer,
    kl,
):
    setup = lora_config(adder_model, 2, optimizer, kl_coeff=kl).learners(**strategy)
    compare(setup, uneven, alone[optimizer, kl])


def test_the_reference_is_the_model_without_its_adapter(adder_model, alone):
    """No second model is made, and KL to it pulls the adapter back to nothing."""

    def size(state):
        return sum(v.pow(2).sum().item() for k, v in state.items() if "lora_B" in k)

    _, free, _, _ = alone["adamw", 0.0]
    _, held, _, _ = alone["adamw", 2.0]
    assert 0 < size(held) < size(free)
    group = make_group(lora_config(adder_model, kl_coeff=2.0))
    learner = group._learner
    sequences = demonstrations()
    plain = learner._logprobs_of(sequences)
    with torch.no_grad():
        for name, value in learner._unwrapped.named_parameters():
            if "lora_B" in name:
                value.fill_(0.1)
    adapted = learner._logprobs_of(sequences)
    reference = learner._reference_logprobs_of(sequences)
    assert all(torch.equal(plain[i], reference[i]) for i in plain)
    assert all((plain[i] - adapted[i]).abs().max() > 0.01 for i in plain)
    assert all(torch.equal(v, adapted[i]) for i, v in learner._logprobs_of(sequences).items())
    assert learner._reference is None
    group.shutdown()


def demonstrations():
    return [
        TokenSequence(ids, [NOT_TRAINED, *[0] * (len(ids) - 1)], [0.0] * len(ids))
        for ids in ([5, 9, 30, 12, 7], [60, 3, 8])
    ]


@pytest.mark.deepspeed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_bfloat16_base_and_float32_adapter(adder_model, uneven, strategy):  # noqa: F811
    """Small updates would be lost in bfloat16 weights; the base stays in it."""
    ends = []
    for learners in (0, 2):
        setup = lora_config(adder_model, learners, "sgd").language_model(dtype="bfloat16")
        if learners:
            setup.learners(strategy=strategy)
        group = make_group(setup)
        start, base = weights(group), base_of(group)
        assert {v.dtype for k, v in start.items() if k != BASE_MARK} == {torch.float32}
        assert {v.dtype for v in base.values()} == {torch.bfloat16}
        train(group, uneven, 2)
        assert all(torch.equal(base[k], v) for k, v in base_of(group).items())
        ends.append(weights(group))
        group.shutdown()
    assert changes(start, ends[0]) > 1e-3
    assert changes(*ends) < 0.2 * changes(start, ends[0])


# Runs: what moves, what is saved, what is refused.


@pytest.fixture(scope="module")
def trained(adder_model, tmp_path_factory):
    """A run with a remote env runner: its results, its algorithm's last weights, its checkpoint."""
    algorithm = lora_config(adder_model).env_runners(num_env_runners=1).build_algo()
    results = [algorithm.train() for _ in range(2)]
    path = tmp_path_factory.mktemp("lora") / "checkpoint"
    algorithm.save_to_path(str(path))
    state = weights(algorithm.learner_group)
    algorithm.stop()
    return results, state, path


def test_only_the_adapter_moves_and_runners_sample_with_it(trained, adder_model):
    """A runner that had another base would sample with other probabilities than are trained."""
    results, state, _ = trained
    for result in results:
        assert abs(result["mismatch"]["kl"]) < 1e-6
        assert result["sync"]["bytes"] == sum(v.nbytes for v in state.values())
    algorithm = config(adder_model, 0).env_runners(num_env_runners=1).build_algo()
    whole = algorithm.train()["sync"]["bytes"]
    full = sum(v.nbytes for v in weights(algorithm.learner_group).values())
    algorithm.stop()
    assert whole == full > 10 * results[0]["sync"]["bytes"]


def test_a_base_of_ones_own_is_refused_by_the_runner(adder_model):
    """Adapter states leave the rest of a runner's weights at *their* initialisation."""
    scratch = json.loads(SMALL)
    setup = lora_config(adder_model).language_model(model=scratch, tokenizer=adder_model)
    spec = setup.get_multi_rl_module_spec(spaces=SPACES)
    one, same = spec.build()["default_policy"], spec.build()["default_policy"]
    with torch.no_grad():
        for value in one.parameters():
            if value.requires_grad:
                value.add_(0.5)
    same.set_state(one.get_state(inference_only=True))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(same.model(ids).logits, one.model(ids).logits)
    other = lora_config(adder_model).language_model(model=scratch, tokenizer=adder_model)
    other.debugging(seed=1)
    module = other.get_multi_rl_module_spec(spaces=SPACES).build()["default_policy"]
    with pytest.raises(ConfigError, match="another base model"):
        module.set_state(one.get_state())


def test_a_checkpoint_holds_the_adapter_alone(trained, adder_model):
    _, state, path = trained
    base = Path(adder_model, "model.safetensors").stat().st_size
    module = path / "learner_group" / "learner" / "rl_module" / "default_policy"
    size = sum(f.stat().st_size for f in module.rglob("*") if f.is_file())
    assert size < 0.2 * base
    assert set(state) - {BASE_MARK} == {k for k in state if ".lora_" in k}


def test_a_run_goes_on_with_another_number_of_learners(trained, adder_model, uneven):  # noqa: F811
    """As one does that was not interrupted."""
    _, state, path = trained
    ends = []
    for learners in (0, 2):
        algorithm = lora_config(adder_model, learners).build_algo()
        algorithm.restore_from_path(str(path))
        kept = weights(algorithm.learner_group)
        assert all(torch.equal(kept[k], v) for k, v in state.items())
        train(algorithm.learner_group, uneven, 2)
        ends.append(weights(algorithm.learner_group))
        algorithm.stop()
    assert changes(*ends) <= 0.01 * changes(state, ends[0])


def zero(stage):
    return 2, {"strategy": "deepspeed", "strategy_options": {"stage": stage}}


FSDP2 = (2, {"strategy": "fsdp2"})
SINGLE = (0, {"strategy": "single"})


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    ("before", "after"),
    [(FSDP2, SINGLE), (SINGLE, FSDP2), (zero(3), zero(3))],
    ids=["fsdp2-single", "single-fsdp2", "zero3"],
)
def test_a_run_goes_on_with_another_strategy_as_if_nothing_had_been(
    adder_model,
    uneven,  # noqa: F811
    alone,
    tmp_path,
    before,
    after,
):
    start, single, single_norms, _ = alone["adamw", 0.0]
    norms = []
    for (learners, strategy), count in ((before, 2), (after, UPDATES - 2)):
        setup = lora_config(adder_model, learners).learners(**strategy)
        algorithm = setup.build_algo()
        if norms:
            algorithm.restore_from_path(str(tmp_path / "checkpoint"))
        norms += train(algorithm.learner_group, uneven, count)[0]
        end = weights(algorithm.learner_group)
        algorithm.save_to_path(str(tmp_path / "checkpoint"))
        algorithm.stop()
    assert norms == pytest.approx(single_norms, rel=1e-4)
    assert changes(single, end) <= 0.01 * changes(start, single)
    shards = tmp_path / "checkpoint" / "learner_shards"
    size = sum(f.stat().st_size for f in shards.rglob("*") if f.is_file())
    assert size < 0.5 * Path(adder_model, "model.safetensors").stat().st_size


def test_what_does_not_belong_to_the_base_is_refused(trained, adder_model, tmp_path):
    _, state, path = trained
    whole = config(adder_model, 0).build_algo()
    with pytest.raises(ConfigError, match=r"base_mark.*nothing was loaded.*lora="):
        whole.restore_from_path(str(path))
    module = whole.learner_group._learner._unwrapped
    with pytest.raises(ConfigError, match=r"adapter alone: set language_model\(lora"):
        module.set_state(state)
    whole.save_to_path(str(tmp_path / "whole"))
    weights_of_a_model = module.get_state()
    whole.stop()
    for lora in ({**LORA, "rank": 2}, {**LORA, "targets": ["q_proj"]}):
        algorithm = lora_config(adder_model, lora=lora).build_algo()
        for checkpoint in (path, tmp_path / "whole"):
            with pytest.raises(ConfigError, match=r"nothing was loaded.*lora="):
                algorithm.restore_from_path(str(checkpoint))
        module = algorithm.learner_group._learner._unwrapped
        with pytest.raises(ConfigError, match="of a whole model"):
            module.set_state(weights_of_a_model)
        algorithm.stop()
    with pytest.raises(ConfigError, match="has no weights for"):
        module.set_state({BASE_MARK: state[BASE_MARK]})


def test_an_adapter_of_another_base_is_refused_by_remote_learners_too(ray_session, tmp_path):
    """Of the same architecture: only its values tell."""
    for seed, learners in ((0, 0), (1, 1)):
        setup = lora_config(json.loads(SMALL), learners).debugging(seed=seed)
        algorithm = setup.build_algo()
        if not seed:
            algorithm.save_to_path(str(tmp_path / "checkpoint"))
        else:
            with pytest.raises(ConfigError, match="another base model"):
                algorithm.restore_from_path(str(tmp_path / "checkpoint"))
        algorithm.stop()


def test_a_cold_start_trains_the_adapter(adder_model):
    """With dropout, which reinforcement does without."""
    start = {"data": "expert", "steps": 4, "batch_size": 8, "lr": 1e-2}
    setup = lora_config(adder_model, lora={**LORA, "dropout": 0.5})
    algorithm = setup.language_model(cold_start=start).build_algo()
    learner = algorithm.learner_group._learner
    base, before = base_of(algorithm.learner_group), weights(algorithm.learner_group)
    sequences = demonstrations()
    quiet = [learner.supervised_loss(sequences) for _ in range(2)]
    assert quiet[0] == quiet[1]
    algorithm.run_cold_start_once()
    assert changes(before, weights(algorithm.learner_group)) > 1e-3
    assert all(torch.equal(base[k], v) for k, v in base_of(algorithm.learner_group).items())
    noisy = {learner.supervised_step(sequences, 0.0, 1.0) for _ in range(4)}
    assert len(noisy) > 1
    assert abs(algorithm.train()["mismatch"]["kl"]) < 1e-6
    algorithm.stop()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rnak": 8}, "did you mean 'rank'"),
        ({"rank": 0}, "at least 1"),
        ({"alpha": -1}, "above 0"),
        ({"dropout": 1.0}, r"in \[0, 1\)"),
        ({"dropout": 0.1}, "no effect without a cold start"),
        ({"targets": "all"}, "all-linear"),
        ({"targets": []}, "all-linear"),
        ({"rslora": "yes"}, "true or false"),
        (8, "give a dict"),
    ],
)
def test_settings_that_cannot_be_are_refused(lora, message):
    with pytest.raises(ConfigError, match=message):
        lora_config("none", lora=lora).validate()


@pytest.mark.parametrize("targets", [["q_porj"], ["lm_head"], ["embed_tokens"]])
def test_targets_that_are_no_linear_layers_are_refused(adder_model, targets):
    """The output head's weight is read by the log-probabilities, past any adapter."""
    setup = lora_config(adder_model, lora={"targets": targets})
    with pytest.raises(ConfigError, match=r"no linear layer of the model.*q_proj"):
        setup.get_multi_rl_module_spec(spaces=SPACES).build()


def test_what_does_not_go_with_lora_is_refused(monkeypatch):
    setup = lora_config("none", kl_coeff=0.1).language_model(cold_start={"steps": 1})
    with pytest.raises(ConfigError, match="KL would undo the cold start"):
        setup.validate()
    setup = lora_config("none", 2).language_model(dtype="bfloat16").learners(strategy="deepspeed")
    with pytest.raises(ConfigError, match="DeepSpeed would turn"):
        setup.validate()
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"rllib-gtpo\[lora\]"):
        lora_config("none").validate()
