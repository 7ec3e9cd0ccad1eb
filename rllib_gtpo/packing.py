"""Trajectories to token batches: which tokens are trained, for which turn, in which micro-batch.

Pure torch.  Shapes: `_B` rows, `_T` tokens of a row, `_N` trained tokens of a batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

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
    """Whole sequences, and flat columns of their trained tokens in the order of the rows.

    Either one packed row, sequence behind sequence, for a model that knows their bounds; or one
    sequence a row, padded on the right: with causal attention no real token sees padding, so no
    mask is needed.  Either way every sequence computes what it would compute alone.
    """

    input_ids_BT: Tensor
    positions_N: Tensor  # flat index (into B*T) of the token that *predicts* the trained one
    targets_N: Tensor  # the trained token
    turns_N: Tensor  # row of its turn
    sequences_N: Tensor  # index of its sequence in the list that was packed
    sampling_logprobs_N: Tensor
    position_ids_BT: Tensor | None = None  # packed: from 0 on in each sequence
    bounds: Tensor | None = None  # packed: where sequences begin, and the end; int32
    lengths: tuple[int, ...] | None = None  # packed: of the sequences

    @property
    def num_tokens(self) -> int:
        """Computed tokens, padding included."""
        return self.input_ids_BT.numel()

    def to(self, device: torch.device | str) -> TokenBatch:
        """The batch on a device."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        moved: dict[str, Any] = {
            name: v.to(device) if isinstance(v, Tensor) else v for name, v in values.items()
        }
        return TokenBatch(**moved)


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


def micro_batches(
    lengths: Sequence[int], token_budget: int, *, packed: bool = False
) -> list[list[int]]:
    """Indices of sequences by micro-batch, each within the budget.

    Packed, there are as few as possible, of nearly equal tokens.  Padded, similar lengths stand
    together (rows x longest counts), and the cut is the cheapest one, counting padding and
    `PASS_COST` for each micro-batch.  A sequence longer than the budget gets one of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    if packed:
        return _even_parts(lengths, order, token_budget)
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


def _even_parts(lengths: Sequence[int], order: list[int], budget: int) -> list[list[int]]:
    """The longest first, each to the lightest part; one part more until all are in the budget."""
    long = [[i] for i in order if lengths[i] >= budget]
    rest = order[len(long) :]
    count = -(-sum(lengths[i] for i in rest) // budget)
    while True:
        heap = [(0, part) for part in range(count)]
        parts: list[list[int]] = [[] for _ in range(count)]
        for i in rest:
            load, part = heapq.heappop(heap)
            parts[part].append(i)
            heapq.heappush(heap, (load + lengths[i], part))
        if all(load <= budget for load, _ in heap):
            return long + parts
        count += 1


def collate(
    sequences: Sequence[TokenSequence], indices: Sequence[int], *, packed: bool = False
) -> TokenBatch:
    """One micro-batch of the sequences at `indices`."""
    lengths = [len(sequences[i].token_ids) for i in indices]
    ids = [torch.tensor(sequences[i].token_ids) for i in indices]
    width = max(lengths)
    if packed:
        bounds = torch.tensor([0, *accumulate(lengths)])
        starts, input_ids = bounds[:-1], torch.cat(ids)[None]
    else:
        starts = torch.arange(len(indices)) * width
        input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    lengths_B = torch.tensor(lengths)
    place = torch.arange(sum(lengths)) - (lengths_B.cumsum(0) - lengths_B).repeat_interleave(
        lengths_B
    )  # of every token in its sequence
    turns = torch.tensor([turn for i in indices for turn in sequences[i].turns])
    trained = turns != NOT_TRAINED
    if bool((trained & (place == 0)).any()):
        raise ValueError("the first token of a sequence has no context to be predicted from")
    flat = place + starts.repeat_interleave(lengths_B)
    logprobs = torch.tensor([value for i in indices for value in sequences[i].logprobs])
    return TokenBatch(
        input_ids,
        flat[trained] - 1,
        torch.cat(ids)[trained],
        turns[trained],
        torch.tensor(list(indices)).repeat_interleave(lengths_B)[trained],
        logprobs[trained].float(),
        place[None] if packed else None,
        bounds.int() if packed else None,
        tuple(lengths) if packed else None,
    )


def empty_batch(*, packed: bool = False) -> TokenBatch:
    """A batch that trains nothing: what a learner computes while others have more micro-batches."""
    return collate([TokenSequence([0], [NOT_TRAINED], [0.0])], [0], packed=packed)


def shard_groups(groups: Sequence[Group], shards: int) -> list[list[Group]]:
    """Whole groups to shards, balanced by tokens; deterministic, and in order within a shard."""
    loads = [0] * shards
    owner: dict[int, int] = {}
    for index in sorted(range(len(groups)), key=lambda i: (-groups[i].num_tokens, i)):
        lightest = min(range(shards), key=lambda s: (loads[s], s))
        loads[lightest] += groups[index].num_tokens
        owner[index] = lightest
    return [[g for i, g in enumerate(groups) if owner[i] == shard] for shard in range(shards)]
