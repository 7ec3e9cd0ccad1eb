"""float32 master weights of a model that computes in bfloat16.

A bfloat16 number has 8 bits: an update that is smaller than 1/512 of a weight, as nearly all are at
the learning rates of reinforcement, would be rounded away.  So gradients are summed, and optimizers
step, in float32, and the model's own weights are rounded from the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Masters = Mapping[Any, Tensor]
"""The float32 weights of each trained parameter."""


def make_masters(module: Any) -> dict[Any, Tensor]:
    """Takes a float32 module's trained weights as masters, and makes its parameters bfloat16.

    Buffers stay what they are: rotary frequencies in bfloat16 would be other frequencies.  From now
    on, gradients are added up in the masters.
    """
    masters = {p: p.detach().clone() for p in module.parameters() if p.requires_grad}
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    for parameter, master in masters.items():
        parameter.register_post_accumulate_grad_hook(_adder(master))
    return masters


def round_into_module(masters: Masters) -> None:
    """Gives the parameters the values of their masters."""
    with torch.no_grad():
        for parameter, master in masters.items():
            parameter.copy_(master)


def average_gradients(masters: Sequence[Tensor]) -> None:
    """Over learners, in float32."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for master in masters:
        if master.grad is None:  # another learner may have one
            master.grad = torch.zeros_like(master)
        dist.all_reduce(master.grad)
        master.grad /= dist.get_world_size()


def _adder(master: Tensor) -> Any:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return add
