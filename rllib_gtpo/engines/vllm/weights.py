"""Weights on their way from the learners to the engines of a node.  Neither ray nor vLLM here.

A learner packs its state once; the object store carries the pack to each node; there one engine
writes it into anonymous shared memory, from which every engine process of the node reads.  The
memory is a file without a name: it goes when its writer does, however that ends.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

_ALIGN = 64
_MODULE_PREFIX = "model."  # the attribute of the RLModule that holds the Hugging Face model

Layout = list[tuple[str, str, list[int], int]]
"""Of each tensor: name, dtype, shape, and the offset of its first byte."""


def pack_state(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, list[int], Any]]:
    """The weights of an LLMModule under Hugging Face names, as bytes that pickle without a copy.

    Tied weights are in the state once, so that the output head of a tied model is not in it.
    """
    packed = {}
    for name, tensor in state.items():
        tensor = tensor.detach().to("cpu").contiguous()
        flat = tensor.view(torch.uint8) if tensor.dim() else tensor.reshape(1).view(torch.uint8)
        packed[name.removeprefix(_MODULE_PREFIX)] = (
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            flat.reshape(-1).numpy(),
        )
    return packed


@dataclass(frozen=True)
class SharedWeights:
    """Where processes of this node find a version of the weights."""

    descriptor: int  # of the writing process
    path: str
    layout: Layout

    def close(self) -> None:
        """Frees the memory once nobody maps it."""
        os.close(self.descriptor)


def share(packed: Mapping[str, tuple[str, list[int], Any]]) -> SharedWeights:
    """Writes packed weights into anonymous shared memory."""
    layout: Layout = []
    size = 0
    for name, (dtype, shape, data) in packed.items():
        layout.append((name, dtype, shape, size))
        size += -(-len(data) // _ALIGN) * _ALIGN
    descriptor = os.memfd_create("rllib-gtpo-weights", os.MFD_CLOEXEC)
    os.truncate(descriptor, max(size, 1))
    memory = np.memmap(f"/proc/self/fd/{descriptor}", dtype=np.uint8, mode="r+")
    for (_, _, _, offset), (_, _, data) in zip(layout, packed.values(), strict=True):
        memory[offset : offset + len(data)] = data
    return SharedWeights(descriptor, f"/proc/{os.getpid()}/fd/{descriptor}", layout)


def read_shared(path: str, layout: Layout) -> Iterator[tuple[str, torch.Tensor]]:
    """The named tensors of `share`, as views that must not be written to or kept."""
    memory = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="c"))
    for name, dtype_name, shape, offset in layout:
        dtype = getattr(torch, dtype_name)
        count = int(np.prod(shape, dtype=np.int64))
        end = offset + count * dtype.itemsize
        yield name, memory[offset:end].view(dtype).reshape(shape)
