"""New tokens on their way into the running rows of a cache, and how they attend to it.

A forward takes *parts*, each of contiguous rows.  Within a part all rows have one width: they are
padded on the left, so that the last column is the last new token of every row.

Shape suffixes: _B row of a part, _Q new token of a row, _N token of all parts that is no padding,
_R row of the cache, _H heads, _C column of the cache, _D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

GROUPED_ATTENTION = "rllib_gtpo_grouped"


@dataclass(slots=True)
class Part:
    """New tokens of the rows from `first` on, and their columns.

    real_BQ: which of them are no padding; None: all.
    """

    first: int
    ids_BQ: np.ndarray
    position_BQ: np.ndarray
    real_BQ: np.ndarray | None = None

    @staticmethod
    def one_each(tokens: Sequence[int], positions: Sequence[int]) -> Part:
        """One token for each of the first rows."""
        ids, columns = (np.array(x, dtype=np.int64)[:, None] for x in (tokens, positions))
        return Part(0, ids, columns)

    @staticmethod
    def of(first: int, ids: Sequence[np.ndarray], starts: Sequence[int]) -> Part:
        """The `ids` of each row, at least one, of which the cache holds the first `starts`."""
        lengths_B = np.array([len(new) for new in ids])
        width = int(lengths_B.max())
        column_BQ = np.arange(width)[None] - (width - lengths_B)[:, None]
        real_BQ = column_BQ >= 0
        ids_BQ = np.zeros(real_BQ.shape, dtype=np.int64)
        ids_BQ[real_BQ] = np.concatenate(ids)
        position_BQ = np.where(real_BQ, column_BQ + np.array(starts)[:, None], 0)
        return Part(first, ids_BQ, position_BQ, None if real_BQ.all() else real_BQ)

    def __len__(self) -> int:
        """Tokens, padding included."""
        return self.ids_BQ.size

    @property
    def rows_N(self) -> np.ndarray:
        """The row of each token."""
        rows_BQ = np.broadcast_to(np.arange(len(self.ids_BQ))[:, None], self.ids_BQ.shape)
        return self.first + self.without_padding(rows_BQ)

    def without_padding(self, values_BQ: np.ndarray) -> np.ndarray:
        """One value for each token."""
        return values_BQ.ravel() if self.real_BQ is None else values_BQ[self.real_BQ]

    def cut(self, tokens: int) -> Iterator[Part]:
        """Itself, or several one after the other, of at most `tokens` each."""
        rows, width = self.ids_BQ.shape
        chunk = max(tokens // rows, 1)
        for end in range(width - (width - 1) // chunk * chunk, width + 1, chunk):
            piece = np.s_[:, max(end - chunk, 0) : end]
            real_BQ = None if self.real_BQ is None else self.real_BQ[piece]
            yield Part(self.first, self.ids_BQ[piece], self.position_BQ[piece], real_BQ)


class Reach:
    """What the tokens of a part see: built once for a forward, for all layers."""

    def __init__(self, part: Part, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        """`columns`: how many of the cache are looked at."""
        rows, width = part.ids_BQ.shape
        self.shape = rows, width
        self.view = np.s_[part.first : part.first + rows, :, :columns]
        position_BQ = torch.from_numpy(np.ascontiguousarray(part.position_BQ)).to(device)
        hidden_B1QC = torch.arange(columns, device=device) > position_BQ[:, None, :, None]
        self.mask_B1QC = torch.zeros(hidden_B1QC.shape, dtype=dtype, device=device)
        self.mask_B1QC.masked_fill_(hidden_B1QC, torch.finfo(dtype).min)
        self.real_N: Tensor | None = None  # of the padded tokens, in order
        if part.real_BQ is not None:
            self.real_N = torch.from_numpy(part.real_BQ.ravel().nonzero()[0]).to(device)
        self.tokens = rows * width if self.real_N is None else len(self.real_N)

    def padded(self, query_NHD: Tensor) -> Tensor:
        """As the kernels want it, [B, H, Q, D]."""
        if self.real_N is not None:
            padded = query_NHD.new_zeros(self.shape[0] * self.shape[1], *query_NHD.shape[1:])
            query_NHD = padded.index_copy_(0, self.real_N, query_NHD)
        return query_NHD.unflatten(0, self.shape).transpose(1, 2)

    def packed(self, out_BQHD: Tensor) -> Tensor:
        """Back again, [N, H, D]."""
        out = out_BQHD.flatten(0, 1)
        return out if self.real_N is None else out[self.real_N]


def rows_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    reaches: Sequence[Reach] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers.

    Args:
        reaches: of the parts whose tokens follow each other in the one row of `query`; `key` and
            `value` are the whole cache.  None: rows are rows, and the mask says what they see.
    """
    if reaches is None:
        return grouped_attention(module, query, key, value, attention_mask, **kwargs)
    parts = query[0].transpose(0, 1).split([reach.tokens for reach in reaches])
    outs = []
    for reach, query_NHD in zip(reaches, parts, strict=True):
        seen = key[reach.view], value[reach.view], reach.mask_B1QC
        out_BQHD, _ = grouped_attention(module, reach.padded(query_NHD), *seen, **kwargs)
        outs.append(reach.packed(out_BQHD))
    return (outs[0] if len(outs) == 1 else torch.cat(outs))[None], None


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Scaled dot-product attention that never copies the cache to repeat key-value heads.

    The stock function repeats all keys and values of all rows for each new token.  With one query
    per row, the heads that share a key-value head can stand in the query dimension instead.
    """
    batch, heads, length, width = query.shape
    if heads == key.shape[1] or attention_mask is None or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling") or width**-0.5
    if length == 1:
        grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], width)
        if query.device.type == "cpu" and query.dtype == torch.float32:  # faster than the kernel
            weights = torch.matmul(grouped * scale, key.transpose(2, 3)).add_(attention_mask)
            out = torch.matmul(weights.softmax(-1), value)
        else:
            out = F.scaled_dot_product_attention(
                grouped, key, value, attn_mask=attention_mask, scale=scale
            )
        return out.reshape(batch, 1, heads, value.shape[-1]), None
    if query.device.type != "cpu":  # there, grouped heads with a mask mean the slowest kernel
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_ATTENTION, rows_attention)
