"""Attention over one row that holds many whole sequences, none of which sees another.

On a GPU in half precision the variable-length kernel does it.  Elsewhere each sequence is a causal
call of its own, and neighbours of equal length share one, so that neither padding nor a mask of
all tokens by all tokens is made.

Shape suffixes: _H heads, _T tokens of the row, _D head width, _S sequences of one length, _L their
length.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED_ATTENTION = "rllib_gtpo_packed"


class PackedLengths:
    """Lengths of the sequences in a row, in order; an object, since torch.compile would compile a
    layer anew for every other tuple of numbers."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed_lengths: PackedLengths | None = None,
    packed_bounds: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers; without `packed_lengths` it is the stock one.

    Compiled, it would be compiled for every combination of lengths anew.

    Args:
        packed_lengths: of the sequences in the row.
        packed_bounds: their cumulative sum from 0 on, int32, on the device.
    """
    if packed_lengths is None or packed_bounds is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        longest = max(packed_lengths.lengths)
        q_THD, k_THD, v_THD = (x[0].transpose(0, 1) for x in (query, key, value))
        out_THD: Any = varlen_attn(
            q_THD,
            k_THD,
            v_THD,
            packed_bounds,
            packed_bounds,
            longest,
            longest,
            scale=scaling,
            window_size=(-1, 0),
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return out_THD.unsqueeze(0), None
    runs = [(length, len(list(same))) for length, same in groupby(packed_lengths.lengths)]
    # `split`, not slices: the gradient of each slice would be a row of zeros as long as all of it.
    parts = [x[0].split([n * length for length, n in runs], dim=1) for x in (query, key, value)]
    outs = []
    for (length, count), *qkv in zip(runs, *parts, strict=True):
        q_SHLD, k_SHLD, v_SHLD = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
        out_SHLD = F.scaled_dot_product_attention(
            q_SHLD,
            k_SHLD,
            v_SHLD,
            dropout_p=dropout,
            is_causal=True,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outs.append(out_SHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)[None], None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """None where nobody gave a mask: causality and the bounds say all."""
    if attention_mask is None:
        return None
    return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _mask)


def why_not_packed(config: Any) -> str | None:
    """What in a model's text config rules packed attention out, if anything does."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if odd := kinds - {"full_attention"}:
        return f"it has layers of type {sorted(odd)}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it attends to a sliding window"
    return None
