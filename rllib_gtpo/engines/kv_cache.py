"""Keys and values of the trajectories that an in-process engine holds.

`BatchCache` holds the running rows: contiguous from row 0, so that the attention of a step reads
views and gathers nothing.  Column = position in the trajectory.  `WaitingCaches` holds, at their
exact length, those of trajectories that wait for a tool; a row is copied once when it leaves the
batch and once when it returns.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

Blocks = list[torch.Tensor]
"""Keys and values [..., heads, tokens, width] of one trajectory, layer by layer."""


def _power_of_two(n: int, least: int, most: int) -> int:
    return max(n, min(most, max(least, 1 << (n - 1).bit_length())))


class BatchCache(Cache):
    """The running rows of a batch, as a transformers cache.

    Memory is allocated at the first forward and doubles when rows or columns run out.  It starts as
    zeros because masked columns still meet the values in a product, where NaN would spread.

    Args:
        max_rows: most rows; doubling stops there.
        max_columns: most columns; doubling stops there.
        max_tokens: most rows x columns; doubling stops there.
    """

    def __init__(self, max_rows: int, max_columns: int, max_tokens: int) -> None:
        super().__init__(layers=[])
        self.max_rows = max_rows
        self.max_columns = max_columns
        self.max_tokens = max_tokens
        self.clear()

    def clear(self) -> None:
        """Forgets everything and gives the memory back."""
        self._blocks: Blocks = []  # [..., rows, heads, columns, width]
        self._stores: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values in them
        self.rows = self.columns = 0

    @torch.inference_mode()
    def reserve(self, rows: int, columns: int, live: int, limit: int) -> None:
        """Makes room for `rows` x `columns`, keeping the first `live` rows.

        Columns will grow to `limit` at most; rows x limit is within `max_tokens`.
        """
        if rows <= self.rows and columns <= self.columns:
            return
        kept = self.columns
        self.rows = _power_of_two(max(rows, self.rows), 8, self.max_rows)
        self.columns = _power_of_two(max(columns, self.columns), 64, self.max_columns)
        if self.rows * self.columns > self.max_tokens:
            self.rows, self.columns = rows, limit
            kept = min(kept, limit)
        blocks, stores = self._blocks, self._stores
        self._blocks, self._stores = [], []
        for keys, values in stores:
            self._allocate(keys, values)
        for new, old in zip(self._blocks, blocks, strict=True):
            new[..., :live, :, :kept, :] = old[..., :live, :, :kept, :]

    def _allocate(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Makes room for another layer, whose keys and values are like these: in one piece, if they
        are alike, for a copy of a row costs as much as a call."""
        shapes = [(self.rows, x.shape[1], self.columns, x.shape[3]) for x in (keys, values)]
        if shapes[0] == shapes[1]:
            block = keys.new_zeros(2, *shapes[0])
            self._blocks.append(block)
            self._stores.append((block[0], block[1]))
        else:
            self._stores.append((keys.new_zeros(shapes[0]), values.new_zeros(shapes[1])))
            self._blocks += self._stores[-1]

    def select(
        self,
        rows_N: torch.Tensor,
        columns_N: torch.Tensor,
        real_N: torch.Tensor | None = None,
        view: tuple[slice, slice, slice] = (slice(None),) * 3,
    ) -> None:
        """Says where the next forward writes and what it reads.

        Args:
            rows_N, columns_N: of each new token.
            real_N: which of the tokens that come are to be written, if some are padding.
            view: rows, heads and columns that the attention gets.
        """
        self._target = (rows_N, columns_N)
        self._real, self._view = real_N, view

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the new keys and values of a layer, returns all that the rows can attend to."""
        if layer_idx == len(self._stores):
            self._allocate(key_states, value_states)
        keys, values = self._stores[layer_idx]
        for store, new in ((keys, key_states), (values, value_states)):
            new = new.transpose(1, 2).flatten(0, 1)
            store.transpose(1, 2)[self._target] = new if self._real is None else new[self._real]
        return keys[self._view], values[self._view]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns in use; rows differ, so that a forward always passes its own positions."""
        return self.columns

    @torch.inference_mode()
    def store(self, row: int, length: int) -> Blocks:
        """A copy of the first `length` columns of a row."""
        return [block[..., row, :, :length, :].clone() for block in self._blocks]

    @torch.inference_mode()
    def load(self, row: int, saved: Blocks, length: int) -> None:
        """Writes the first `length` columns of a stored row."""
        for block, old in zip(self._blocks, saved, strict=True):
            block[..., row, :, :length, :] = old[..., :length, :]

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` columns of one row to another."""
        for block in self._blocks:
            block[..., target, :, :length, :] = block[..., source, :, :length, :]


@dataclass(slots=True)
class Saved:
    """The cache of a trajectory that is not in the batch: `ids` are the tokens it covers."""

    ids: np.ndarray
    blocks: Blocks

    def common_prefix(self, ids: np.ndarray) -> int:
        """How many leading tokens agree with `ids`."""
        n = min(len(ids), len(self.ids))
        differs = np.flatnonzero(self.ids[:n] != ids[:n])
        return int(differs[0]) if len(differs) else n


class WaitingCaches:
    """Caches of waiting trajectories by name, the least recently stored first."""

    def __init__(self) -> None:
        self._saved: OrderedDict[str, Saved] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._saved)

    def put(self, name: str, saved: Saved) -> None:
        """Keeps a cache under a name; it becomes the last to be evicted."""
        self.pop(name)
        self._saved[name] = saved
        self.tokens += len(saved.ids)

    def pop(self, name: str) -> Saved | None:
        """Takes a cache out; None if there is none."""
        saved = self._saved.pop(name, None)
        if saved is not None:
            self.tokens -= len(saved.ids)
        return saved

    def shrink(self, tokens: int) -> int:
        """Evicts the oldest until at most `tokens` are held; returns how many went."""
        count = 0
        while self.tokens > max(tokens, 0):
            _, saved = self._saved.popitem(last=False)
            self.tokens -= len(saved.ids)
            count += 1
        return count

    def clear(self) -> None:
        """Forgets all."""
        self._saved.clear()
        self.tokens = 0
