"""Log-probabilities of selected tokens without holding [N, V].

The logits are made tile by tile: some positions, some of the vocabulary.  A tile that stays in a
processor's cache makes that faster than all logits at once, which have to go to memory and back for
every step of the softmax.

Shape suffixes: `_N` selected positions, `_H` hidden, `_V` vocabulary, `_C` one chunk of positions,
`_W` the part of the vocabulary in a tile, `_P` such parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 2**19  # logits of a tile: 2 MiB
TILE_ON_DEVICE = 2**26  # where a tile is to fill an accelerator: 256 MiB
KEPT = 2**22  # logits that are kept for backward if there are no more: 16 MiB


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
    bias: Tensor | None = None,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log_softmax((hidden @ weight.T + bias) / temperature) at `targets`, tile by tile.

    Logits are made in the dtype of `hidden`, as the model's own head would (a weight of another
    dtype is cast), and normalised in float32.  Unless they are few, backward makes them again, so
    peak memory is a few tiles plus the gradients, which are summed in float32 whatever their dtype.
    A weight that needs no gradient costs none.  N = 0 works and backpropagates zeros.

    Args:
        hidden: [N, H], last hidden states of the positions that predict `targets`; select before.
        weight: [V, H], the output embedding.
        targets: Int [N] in 0..V-1.
        temperature: The sampler's, above 0.
        chunk: Positions of a tile, which has as much of the vocabulary as `TILE` allows.
        bias: [V] or None.
        with_entropy: Also return the entropy of each position's distribution.  It carries a
            gradient like the log-probabilities do; backward computes it only if it is used.

    Returns:
        Log-probabilities [N] and entropy [N] or None, float32; float64 if `hidden` is.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} must be [N, H], [V, H]"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} must be [{hidden.shape[0]}]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} must be [{weight.shape[0]}]")
    if not math.isfinite(temperature) or temperature <= 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    logprobs, entropy = _SelectedLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets.long(), temperature, chunk, with_entropy
    )
    return logprobs, entropy if with_entropy else None


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs_N, entropy_N, lse_N = hidden.new_zeros(3, len(hidden), dtype=dtype).unbind()
        keep = len(hidden) * len(weight) <= KEPT and any(ctx.needs_input_grad)
        kept: list[Tensor] = []
        tile, other = _tiles(2, hidden, weight, chunk, dtype)
        for rows in _slices(len(hidden), chunk):
            lse_P, entropy_P = [], []
            for part in _parts(weight, hidden, chunk):
                if keep:
                    tile = torch.empty_like(tile)
                logits_CW = _view(tile, rows, part)
                _logits(hidden[rows], weight[part], bias, part, temperature, logits_CW)
                if keep:
                    kept.append(logits_CW)
                inside_C, place_C = _places(targets[rows], part)
                picked_C = logits_CW.gather(1, place_C[:, None]).squeeze(1)
                logprobs_N[rows] += picked_C.where(inside_C, 0.0)
                most_C = logits_CW.amax(1)
                exp_CW = torch.sub(logits_CW, most_C[:, None], out=_view(other, rows, part)).exp_()
                sum_C = exp_CW.sum(1)
                lse_P.append(most_C + sum_C.log())
                if with_entropy:
                    entropy_P.append(lse_P[-1] - exp_CW.mul_(logits_CW).sum(1) / sum_C)
            lse_CP = torch.stack(lse_P, 1)
            lse_N[rows] = lse_CP.logsumexp(1)
            if with_entropy:  # of the parts' shares, and within each part
                log_share_CP = lse_CP - lse_N[rows, None]
                within_CP = torch.stack(entropy_P, 1)
                entropy_N[rows] = (log_share_CP.exp() * (within_CP - log_share_CP)).sum(1)
        logprobs_N -= lse_N
        ctx.save_for_backward(hidden, weight, bias, targets, lse_N, entropy_N, *kept)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        ctx.set_materialize_grads(False)
        return logprobs_N.clone(), entropy_N.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse_N, entropy_N, *kept = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=ctx.dtype) if wants_weight else None
        dbias = torch.zeros_like(bias, dtype=ctx.dtype) if wants_bias else None
        grad_N = torch.zeros_like(lse_N) if grad_N is None else grad_N
        tile, other = _tiles(2, hidden, weight, ctx.chunk, ctx.dtype)
        for rows in _slices(len(hidden), ctx.chunk):
            hidden_CH, grad_C = hidden[rows], grad_N[rows]
            dhidden_CH = torch.zeros_like(hidden_CH, dtype=ctx.dtype)
            for part in _parts(weight, hidden, ctx.chunk):
                logp_CW = _view(tile, rows, part)
                if kept:
                    logp_CW.copy_(kept.pop(0))
                else:
                    _logits(hidden_CH, weight[part], bias, part, ctx.temperature, logp_CW)
                logp_CW.sub_(lse_N[rows, None])
                if grad_entropy_N is None:
                    dlogits_CW = logp_CW.exp_().mul_(-grad_C[:, None])
                else:  # dH/dlogit = -p (log p + H)
                    dlogits_CW = torch.exp(logp_CW, out=_view(other, rows, part))
                    logp_CW.add_(entropy_N[rows, None]).mul_(-grad_entropy_N[rows, None])
                    dlogits_CW.mul_(logp_CW.sub_(grad_C[:, None]))
                inside_C, place_C = _places(targets[rows], part)
                dlogits_CW.scatter_add_(1, place_C[:, None], (grad_C * inside_C)[:, None])
                if ctx.temperature != 1.0:
                    dlogits_CW.div_(ctx.temperature)
                if dbias is not None:
                    dbias[part] += dlogits_CW.sum(0)
                low_CW = dlogits_CW.to(hidden.dtype)
                if dhidden is not None:
                    _add_product(dhidden_CH, low_CW, weight[part].to(hidden.dtype))
                if dweight is not None:
                    _add_product(dweight[part], low_CW.T, hidden_CH)
            if dhidden is not None:
                dhidden[rows] = dhidden_CH
        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            *(None,) * 4,
        )


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _width(weight_VH: Tensor, hidden_NH: Tensor, chunk: int) -> int:
    """How much of the vocabulary a tile has."""
    tile = TILE if weight_VH.device.type == "cpu" else TILE_ON_DEVICE
    return min(len(weight_VH), max(1, tile // max(1, min(chunk, len(hidden_NH)))))


def _parts(weight_VH: Tensor, hidden_NH: Tensor, chunk: int) -> Iterator[slice]:
    """The parts of the vocabulary of a chunk's tiles."""
    return _slices(len(weight_VH), _width(weight_VH, hidden_NH, chunk))


def _tiles(
    count: int, hidden_NH: Tensor, weight_VH: Tensor, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Memory for so many tiles, used again and again: thousands of tensors that come and go leave
    holes in a process's memory that add up to more than they are."""
    size = min(chunk, len(hidden_NH)) * _width(weight_VH, hidden_NH, chunk)
    return hidden_NH.new_empty(count, size, dtype=dtype).unbind()


def _view(tile: Tensor, rows: slice, part: slice) -> Tensor:
    """The memory of a tile as [C, W]."""
    shape = rows.stop - rows.start, part.stop - part.start
    return tile[: shape[0] * shape[1]].view(shape)


def _places(targets_C: Tensor, part: slice) -> tuple[Tensor, Tensor]:
    """Whether each target is in a part of the vocabulary, and where (anywhere, if it is not)."""
    width = part.stop - part.start
    place_C = targets_C - part.start
    return (place_C >= 0) & (place_C < width), place_C.clamp(0, width - 1)


def _logits(
    hidden_CH: Tensor,
    weight_WH: Tensor,
    bias_V: Tensor | None,
    part: slice,
    temperature: float,
    out: Tensor,
) -> None:
    """Writes [C, W] into `out`; without autocast, so that backward makes the same ones."""
    with torch.autocast(hidden_CH.device.type, enabled=False):
        if hidden_CH.dtype == out.dtype:
            torch.mm(hidden_CH, weight_WH.to(hidden_CH.dtype).T, out=out)
        else:
            out.copy_(hidden_CH @ weight_WH.to(hidden_CH.dtype).T)
    if bias_V is not None:
        out += bias_V[part]
    if temperature != 1.0:
        out.div_(temperature)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, without rounding the product to the dtype of its factors before."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
