"""Token masks, with lists that a person can check."""

from dataclasses import replace

import pytest
import torch

from rllib_gtpo.packing import (
    PASS_COST,
    TokenSequence,
    collate,
    empty_batch,
    micro_batches,
    shard_groups,
    token_sequences,
)
from rllib_gtpo.rl_module import LOGPROBS, LLMModule
from rllib_gtpo.types import Group, Trajectory, Turn


def two_turns() -> Trajectory:
    return Trajectory(
        task={},
        turns=[
            Turn(0, prompt_ids=[7, 8], token_ids=[5, 6], logprobs=[-0.5, -0.6]),
            Turn(1, prompt_ids=[9], token_ids=[4], logprobs=[-0.4]),
        ],
    )


def one_turn() -> Trajectory:
    return Trajectory(
        task={}, turns=[Turn(0, prompt_ids=[1], token_ids=[2, 3], logprobs=[-0.2, -0.3])]
    )


def test_a_trajectory_is_one_stream_whose_tokens_know_their_turn():
    first, second = token_sequences([two_turns(), one_turn()])
    assert first.token_ids == [7, 8, 5, 6, 9, 4]
    assert first.turns == [-1, -1, 0, 0, -1, 1]
    assert first.logprobs == [0.0, 0.0, -0.5, -0.6, 0.0, -0.4]
    assert second.turns == [-1, 2, 2]  # rows go on over trajectories


def test_collated_columns_point_at_the_token_that_predicts():
    batch = collate(token_sequences([two_turns(), one_turn()]), [0, 1])
    assert batch.input_ids_BT.tolist() == [[7, 8, 5, 6, 9, 4], [1, 2, 3, 0, 0, 0]]
    assert batch.positions_N.tolist() == [1, 2, 4, 6, 7]
    assert batch.targets_N.tolist() == [5, 6, 4, 2, 3]
    assert batch.turns_N.tolist() == [0, 0, 1, 2, 2]
    assert batch.sequences_N.tolist() == [0, 0, 0, 1, 1]
    assert batch.sampling_logprobs_N.tolist() == pytest.approx([-0.5, -0.6, -0.4, -0.2, -0.3])


def test_indices_of_sequences_survive_a_subset_in_another_order():
    batch = collate(token_sequences([two_turns(), one_turn()]), [1])
    assert batch.sequences_N.tolist() == [1, 1]
    assert batch.turns_N.tolist() == [2, 2]


def test_missing_log_probabilities_are_refused():
    broken = two_turns()
    broken.turns[1].logprobs = []
    with pytest.raises(ValueError, match="turn 1 of group 0, member 0"):
        token_sequences([broken])


def test_a_sampled_first_token_is_refused():
    with pytest.raises(ValueError, match="no context"):
        collate([TokenSequence([1], [0], [0.0])], [0])


def test_micro_batches_keep_the_budget_and_every_sequence_once():
    lengths = [10, 3, 50, 9, 10, 4]
    batches = micro_batches(lengths, token_budget=30)
    assert sorted(i for b in batches for i in b) == list(range(6))
    for batch in batches:
        assert len(batch) * max(lengths[i] for i in batch) <= 30 or len(batch) == 1
    assert [2] in batches  # longer than the budget: alone


def test_micro_batches_split_where_padding_costs_more_than_a_pass():
    assert micro_batches([1000, 1000, 10, 10], 10_000) == [[0, 1], [2, 3]]
    assert micro_batches([1000, 1000, 990, 990], 10_000) == [[0, 1, 2, 3]]
    assert micro_batches([], 10_000) == []


@pytest.mark.parametrize("budget", [300, 2000, 10**6])
def test_the_cut_is_the_cheapest(budget):
    """Against all cuts of a few sorted lengths."""
    lengths = [900, 400, 390, 60, 50, 40, 40, 7]

    def price(cut):
        return sum(len(b) * lengths[b[0]] + PASS_COST for b in cut)

    def cuts(start):
        if start == len(lengths):
            yield []
        for stop in range(start + 1, len(lengths) + 1):
            if stop - start == 1 or (stop - start) * lengths[start] <= budget:
                for rest in cuts(stop):
                    yield [list(range(start, stop)), *rest]

    assert price(micro_batches(lengths, budget)) == min(map(price, cuts(0)))


def test_an_empty_batch_trains_nothing():
    batch = empty_batch()
    assert len(batch.targets_N) == 0
    assert batch.positions_N.dtype == torch.long


def test_shards_are_whole_groups_balanced_by_tokens():
    def group(number: int, tokens: int) -> Group:
        turn = Turn(0, prompt_ids=[1] * (tokens - 1), token_ids=[2], logprobs=[0.0])
        return Group(number, {}, [Trajectory({}, number, 0, [turn])])

    groups = [group(i, n) for i, n in enumerate([50, 10, 40, 20])]
    shards = shard_groups(groups, 2)
    assert sorted(g.id for shard in shards for g in shard) == [0, 1, 2, 3]
    assert [sum(g.num_tokens for g in shard) for shard in shards] == [60, 60]
    assert shard_groups(groups[:1], 2) == [groups[:1], []]


def test_a_packed_row_holds_whole_sequences_side_by_side():
    batch = collate(token_sequences([two_turns(), one_turn()]), [1, 0], packed=True)
    assert batch.input_ids_BT.tolist() == [[1, 2, 3, 7, 8, 5, 6, 9, 4]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5]]
    assert batch.bounds.tolist() == [0, 3, 9] and batch.lengths == (3, 6)
    assert batch.positions_N.tolist() == [0, 1, 4, 5, 7]
    assert batch.targets_N.tolist() == [2, 3, 5, 6, 4]
    assert batch.turns_N.tolist() == [2, 2, 0, 0, 1]
    assert batch.sequences_N.tolist() == [1, 1, 0, 0, 0]


def test_packed_parts_are_few_nearly_equal_and_within_the_budget():
    generator = torch.Generator().manual_seed(0)
    lengths = (
        torch.empty(200).log_normal_(5, 0.7, generator=generator).clamp(20, 900).int().tolist()
    )
    parts = micro_batches([*lengths, 5000], 4096, packed=True)
    assert sorted(i for part in parts for i in part) == list(range(201))
    assert parts[0] == [200]  # longer than the budget: alone
    loads = [sum(lengths[i] for i in part) for part in parts[1:]]
    assert max(loads) <= 4096
    assert len(loads) == -(-sum(lengths) // 4096)
    assert max(loads) - min(loads) <= min(lengths)
    assert micro_batches([], 4096, packed=True) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sequences_do_not_see_each_other(attention):
    module = tiny_module()
    module.model.set_attn_implementation(attention)
    sequences = token_sequences([two_turns(), one_turn(), one_turn(), two_turns()])
    padded = module.forward_train({"tokens": collate(sequences, range(4))})[LOGPROBS]
    assert module.pack()
    packed = module.forward_train({"tokens": collate(sequences, range(4), packed=True)})[LOGPROBS]
    assert torch.allclose(padded, packed, atol=1e-6)
    row = collate(sequences, range(4), packed=True)
    seeing = module.forward_train({"tokens": replace(row, lengths=None)})[LOGPROBS]
    assert not torch.allclose(padded, seeing, atol=1e-3)  # the mistake would show


def test_checkpointed_activations_keep_the_bounds():
    sequences = token_sequences([two_turns(), one_turn()])
    row = collate(sequences, range(2), packed=True)
    gradients = []
    for checkpointing in (False, True):
        module = tiny_module()
        assert module.pack()
        module.model.train()
        if checkpointing:
            module.model.gradient_checkpointing_enable()
        module.forward_train({"tokens": row})[LOGPROBS].sum().backward()
        gradients.append([p.grad for p in module.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "why",
    [
        {"model_type": "gemma2", "head_dim": 8},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8},
    ],
)
def test_a_model_with_a_sliding_window_is_padded(why):
    assert not tiny_module(**why).pack()


def test_a_model_that_ignores_the_bounds_is_found_out():
    module = tiny_module()
    forward = module.model.get_decoder().forward

    def deaf(*args, packed_lengths=None, packed_bounds=None, **kwargs):
        return forward(*args, **kwargs)

    module.model.get_decoder().forward = deaf
    before = module.model.config._attn_implementation
    assert not module.pack()
    assert module.model.config._attn_implementation == before


def tiny_module(**changes):
    model = {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 300,
        "initializer_range": 0.3,
        **changes,
    }
    settings = {"model": model, "tokenizer": None, "dtype": "float32", "seed": 0}
    return LLMModule(model_config={**settings, "temperature": 1.0})
