"""A whole update at several lengths: tokens per second, and how much of what the device can do.

On CUDA it is a random model of Qwen2.5-7B's shape in bfloat16 with activation checkpointing, and
peak memory is measured, too; on the processor it is a small one.  On CUDA, and where ray is absent,
the Learner's parts stand for the Learner: weights and moments are bfloat16, since the float32
weights that it steps on would need more than one GPU.
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from release.learner.batches import SIZES, ragged_groups, trajectories_of
from release.learner.updates import Learner, Parts, Plain, Side, make_model
from rllib_gtpo.types import Group

QWEN2_5_7B: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Scale:
    """What is run on a kind of device."""

    model: str
    settings: dict[str, Any]
    dtype: str
    checkpointing: bool
    lengths: tuple[int, ...]
    tokens: int  # of an update
    budget: int  # tokens of a micro-batch, unless one trajectory is longer
    side: int  # of the square matrices whose product is timed


SCALES = {
    "cuda": Scale(
        *("7B", QWEN2_5_7B, "bfloat16", True),
        *((2048, 8192, 32768), 65536, 16384, 8192),
    ),
    "cpu": Scale(
        *("tiny", SIZES["tiny"], "float32", False),
        *((128, 512, 2048), 4096, 4096, 2048),
    ),
}


def matrix_peak(device: str, side: int, dtype: torch.dtype, rounds: int = 10) -> float:
    """Floating-point operations per second of the product of two square matrices."""
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(rounds):
        seconds.append(timed(device, lambda: one @ other))
    return 2.0 * side**3 / min(seconds)


def operations(model: Any, groups: Sequence[Group]) -> float:
    """Of an update: 6 for each parameter and token, the head's for trained tokens only, and causal
    attention; what is computed again does not count."""
    config, trajectories = model.config, trajectories_of(groups)
    head = model.get_output_embeddings().weight.numel()
    inputs = model.get_input_embeddings().weight
    tied = inputs is model.get_output_embeddings().weight
    body = sum(p.numel() for p in model.parameters()) - head - (0 if tied else inputs.numel())
    attention = config.num_hidden_layers * config.hidden_size
    return 6.0 * (
        body * sum(t.num_tokens for t in trajectories)
        + head * sum(t.num_trained_tokens for t in trajectories)
        + attention * sum(t.num_tokens**2 for t in trajectories)
    )


def timed(device: str, function: Callable[[], Any]) -> float:
    """Seconds until the device has done it."""
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def rows(device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each length and side; one model is in memory at a time."""
    scale = SCALES[device]
    peak = matrix_peak(device, scale.side, getattr(torch, scale.dtype))
    found = []
    for length in scale.lengths:
        groups = ragged_groups([length] * (scale.tokens // length), vocabulary=256)
        budget = max(length, scale.budget)
        for name in ("plain", "ours"):
            row: dict[str, Any] = {"model": scale.model, "device": device, "length": length}
            row["side"] = name
            try:
                row |= _row(
                    build(name, scale, groups, budget, device), groups, peak, device, rounds
                )
            except torch.OutOfMemoryError:
                row["out_of_memory"] = True
            found.append(row)
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return found


def build(name: str, scale: Scale, groups: Sequence[Group], budget: int, device: str) -> Side:
    """A side with a model of its own."""
    if name == "ours" and device == "cpu" and importlib.util.find_spec("ray") is not None:
        return Learner(scale.settings, groups, budget)
    kind = Plain if name == "plain" else Parts
    model = make_model(scale.settings, device, scale.dtype, scale.checkpointing)
    return kind(model, groups, budget)


def _row(
    side: Side, groups: Sequence[Group], peak: float, device: str, rounds: int
) -> dict[str, Any]:
    side.update()  # warms up, and makes the optimizer's state
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = median(timed(device, side.update) for _ in range(rounds))
    memory = {"peak_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {}
    tokens = sum(t.num_tokens for t in trajectories_of(groups))
    return {
        "runs": type(side).__name__,
        "tokens": tokens,
        "tokens_per_s": tokens / seconds,
        **memory,
        "matrix_tflops": peak / 1e12,
        "of_matrix_peak": operations(side.model, groups) / seconds / peak,
    }
