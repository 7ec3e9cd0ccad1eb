"""Log-probabilities of selected tokens without holding [N, V].

Shape suffixes: `_N` selected positions, `_H` hidden, `_V` vocabulary, `_C` one chunk of positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """log_softmax((hidden @ weight.T + bias) / temperature) at `targets`, chunk by chunk.

    Logits are made in the dtype of `hidden`, as the model's own head would (a weight of another
    dtype is cast once), and normalised in float32.  Backward makes them again, so peak memory is a
    few [chunk, V] plus the gradient of `weight`, which is summed in float32 whatever its dtype.  A
    weight that needs no gradient costs none.  N = 0 works and backpropagates zeros.

    Args:
        hidden: [N, H], last hidden states of the positions that predict `targets`; select before.
        weight: [V, H], the output embedding.
        targets: Int [N] in 0..V-1.
        temperature: The sampler's, above 0.
        chunk: Positions per chunk.
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
        count = hidden.shape[0]
        logprobs_N, entropy_N, lse_N = hidden.new_zeros(3, count, dtype=dtype).unbind()
        cast_VH = weight.to(hidden.dtype)
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            logits_CV = _logits(hidden[rows], cast_VH, bias, temperature, dtype)
            lse_N[rows] = logits_CV.logsumexp(1)
            picked_C = logits_CV.gather(1, targets[rows, None]).squeeze(1)
            logprobs_N[rows] = picked_C - lse_N[rows]
            if with_entropy:
                logp_CV = logits_CV.sub_(lse_N[rows, None])
                entropy_N[rows] = -(logp_CV.exp() * logp_CV).sum(1)
        ctx.save_for_backward(hidden, weight, bias, targets, lse_N, entropy_N)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        ctx.set_materialize_grads(False)
        return logprobs_N.clone(), entropy_N.clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_N: Tensor | None, grad_entropy_N: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lse_N, entropy_N = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        dhidden = torch.zeros_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(weight, dtype=ctx.dtype) if wants_weight else None
        dbias = torch.zeros_like(bias, dtype=ctx.dtype) if wants_bias else None
        cast_VH = weight.to(hidden.dtype)
        grad_N = torch.zeros_like(lse_N) if grad_N is None else grad_N
        for start in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logp_CV = _logits(hidden[rows], cast_VH, bias, ctx.temperature, ctx.dtype)
            logp_CV.sub_(lse_N[rows, None])
            dlogits_CV = logp_CV.exp()
            if grad_entropy_N is not None:  # dH/dlogit = -p (log p + H)
                logp_CV.add_(entropy_N[rows, None]).mul_(-grad_entropy_N[rows, None])
                dlogits_CV.mul_(logp_CV.sub_(grad_N[rows, None]))
            else:
                dlogits_CV.mul_(-grad_N[rows, None])
            dlogits_CV.scatter_add_(1, targets[rows, None], grad_N[rows, None])
            dlogits_CV.div_(ctx.temperature)
            if dbias is not None:
                dbias += dlogits_CV.sum(0)
            low_CV = dlogits_CV.to(hidden.dtype)
            if dhidden is not None:
                dhidden[rows] = low_CV @ cast_VH
            if dweight is not None:
                dweight += low_CV.T @ hidden[rows]
        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            None if dbias is None else dbias.to(bias.dtype),
            *(None,) * 4,
        )


def _logits(
    hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, temperature: float, dtype: Any
) -> Tensor:
    """[C, V] in `dtype`, a fresh tensor; without autocast, so that backward makes the same ones."""
    with torch.autocast(hidden_CH.device.type, enabled=False):
        logits_CV = (hidden_CH @ weight_VH.T).to(dtype)
    if bias_V is not None:
        logits_CV += bias_V
    return logits_CV.div_(temperature)
