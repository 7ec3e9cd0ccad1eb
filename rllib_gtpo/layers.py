"""What a learner may do to each layer of a model: compute it twice to keep less, or compile it.

Either way the layer's `forward` is replaced, and its name, weights and hooks stay, so that a
strategy cuts it like any other.  No ray here.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rllib_gtpo.errors import ConfigError


def decoder_layers(model: Any) -> Any:
    """The blocks of a causal LM, whatever wraps it."""
    lists = [m for m in model.get_decoder().children() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len)


def checkpoint_activations(model: Any) -> None:
    """Keeps the inputs of layers only, and computes a layer again when its gradient is due.

    transformers' own switch works in training mode only; learners compute what engines sampled
    with, so their models are in evaluation mode.
    """
    for layer in decoder_layers(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model: Any, device: torch.device) -> None:
    """torch.compile of each layer, for rows of any length; `checkpoint_activations` comes after it.

    Raises:
        ConfigError: it needs a C++ compiler, and there is none.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"torch_compile on CPU needs a C++ compiler, and {compiler!r} was not found: install "
            "g++ (or set CXX to another), or leave torch_compile out."
        )
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True)
