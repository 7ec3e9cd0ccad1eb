"""Trajectories to token batches: which tokens are trained, for which turn, in which micro-batch.

Pure torch.  Shapes: `_B` rows, `_T` tokens of a row, `_N` trained tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rllib_gtpo.types import Group, Trajectory

NOT_TRAINED = -1
PASS_COST = 512  # what a forward and backward pass costs besides its tokens, in tokens


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """The token stream of one trajectory (or demonstration).

    turns: for each token the row of the turn that sampled it, or NOT_TRAINED.
    logprobs: for each token its sampling log-probability; 0 where it was not sampled.

    Example: prompt ids [7, 8], sampled [5, 6], tool output [9], sampled [4], rows 12 and 13:
        token_ids [7, 8, 5, 6, 9, 4]    turns [-1, -1, 12, 12, -1, 13]
    """

    token_ids: list[int]
    turns: list[int]
    logprobs: list[float]

    @property
    def num_trained(self) -> int:
        """How many tokens are trained."""
        return sum(turn != NOT_TRAINED for turn in self.turns)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Right-padded rows of whole sequences, and flat columns of their trained tokens in row order.

    With causal attention and padding on the right only, no real token sees a padding token, so no
    attention mask is needed and every sequence computes what it would compute alone.
    """

    input_ids_BT: Tensor
    positions_N: Tensor  # flat index (into B*T) of the token that *predicts* the trained one
    targets_N: Tensor  # the trained token
    turns_N: Tensor  # row of its turn
    sequences_N: Tensor  # index of its sequence in the list that was packed
    sampling_logprobs_N: Tensor

    @property
    def num_tokens(self) -> int:
        """Computed tokens, padding included."""
        return self.input_ids_BT.numel()

    def to(self, device: torch.device | str) -> TokenBatch:
        """The batch on a device."""
        return TokenBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def token_sequences(trajectories: Sequence[Trajectory]) -> list[TokenSequence]:
    """The token streams; turn rows count over all trajectories in order."""
    sequences = []
    row = 0
    for trajectory in trajectories:
        ids: list[int] = []
        turns: list[int] = []
        logprobs: list[float] = []
        for turn in trajectory.turns:
            if len(turn.token_ids) != len(turn.logprobs):
                raise ValueError(
                    f"turn {turn.index} of group {trajectory.group_id}, member "
                    f"{trajectory.member} has "
                    f"{len(turn.token_ids)} sampled ids and {len(turn.logprobs)} log-probabilities"
                )
            ids += turn.prompt_ids + turn.token_ids
            turns += [NOT_TRAINED] * len(turn.prompt_ids) + [row] * len(turn.token_ids)
            logprobs += [0.0] * len(turn.prompt_ids) + turn.logprobs
            row += 1
        sequences.append(TokenSequence(ids, turns, logprobs))
    return sequences


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices of sequences by micro-batch: similar lengths together, rows x longest in the budget.

    The cut is the cheapest one, counting padding and `PASS_COST` for each micro-batch.  A sequence
    longer than the budget gets a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    cost = [0] * (len(order) + 1)  # of the cheapest cut of order[start:]
    end = [0] * len(order)  # where its first micro-batch ends
    for start in reversed(range(len(order))):
        width = lengths[order[start]]
        most = min(len(order), start + max(1, token_budget // max(1, width)))
        end[start] = min(
            range(start + 1, most + 1), key=lambda stop: (stop - start) * width + cost[stop]
        )
        cost[start] = (end[start] - start) * width + cost[end[start]] + PASS_COST
    batches = []
    start = 0
    while start < len(order):
        batches.append(order[start : end[start]])
        start = end[start]
    return batches


def collate(sequences: Sequence[TokenSequence], indices: Sequence[int]) -> TokenBatch:
    """One micro-batch of the sequences at `indices`."""
    width = max(len(sequences[i].token_ids) for i in indices)
    input_ids = torch.zeros(len(indices), width, dtype=torch.long)
    positions: list[int] = []
    targets: list[int] = []
    turns: list[int] = []
    owners: list[int] = []
    logprobs: list[float] = []
    for row, index in enumerate(indices):
        sequence = sequences[index]
        input_ids[row, : len(sequence.token_ids)] = torch.tensor(sequence.token_ids)
        for at, turn in enumerate(sequence.turns):
            if turn == NOT_TRAINED:
                continue
            if at == 0:
                raise ValueError(
                    "the first token of a sequence has no context to be predicted from"
                )
            positions.append(row * width + at - 1)
            targets.append(sequence.token_ids[at])
            turns.append(turn)
            owners.append(index)
            logprobs.append(sequence.logprobs[at])
    return TokenBatch(
        input_ids,
        torch.tensor(positions, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.tensor(turns, dtype=torch.long),
        torch.tensor(owners, dtype=torch.long),
        torch.tensor(logprobs, dtype=torch.float32),
    )


def empty_batch() -> TokenBatch:
    """A batch that trains nothing: what a learner computes while others have more micro-batches."""
    return collate([TokenSequence([0], [NOT_TRAINED], [0.0])], [0])


def shard_groups(groups: Sequence[Group], shards: int) -> list[list[Group]]:
    """Whole groups to shards, balanced by tokens; deterministic, and in order within a shard."""
    loads = [0] * shards
    owner: dict[int, int] = {}
    for index in sorted(range(len(groups)), key=lambda i: (-groups[i].num_tokens, i)):
        lightest = min(range(shards), key=lambda s: (loads[s], s))
        loads[lightest] += groups[index].num_tokens
        owner[index] = lightest
    return [[g for i, g in enumerate(groups) if owner[i] == shard] for shard in range(shards)]
