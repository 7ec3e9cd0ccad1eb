"""FSDP2: each learner holds a slice of every parameter, its gradient and its optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from rllib_gtpo.layers import decoder_layers
from rllib_gtpo.strategies.base import State, Strategy, named_tensors, own_group


class FSDP2(Strategy):
    """`strategy_options`: offload (parameters and optimizer wait in CPU memory)."""

    name = "fsdp2"
    options: ClassVar[Mapping[str, Any]] = {"offload": False}
    sharded = True

    def setup_process(self, rank: int, world: int, device: torch.device) -> None:
        """A single learner has no process group yet."""
        own_group(device)

    def shard(self, module: Any) -> None:
        """Layer by layer, then the rest.

        With master weights the slices are float32, and so are sums of gradients; what is gathered
        is bfloat16.
        """
        offload: Any = CPUOffloadPolicy() if self.chosen["offload"] else OffloadPolicy()
        precision: dict[str, Any] = {}
        if self.master_weights:
            precision = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        for layer in decoder_layers(module.model):
            policy = MixedPrecisionPolicy(**precision)
            fully_shard(layer, offload_policy=offload, mp_policy=policy)
        policy = MixedPrecisionPolicy(**precision, cast_forward_inputs=False)  # log-probabilities
        fully_shard(module, offload_policy=offload, mp_policy=policy)

    def forward(self, module: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Through the module's call, whose hooks gather the parameters."""
        output: dict[str, Tensor] = module(batch)
        return output

    def make_reference(self, module: Any, build: Callable[[], Any]) -> Any:
        """See Strategy; sharded like the module."""
        reference = build()
        self.shard(reference)
        reference.sharding = self
        with torch.no_grad():
            for new, old in zip(reference.parameters(), module.parameters(), strict=True):
                new.copy_(old)
        return reference

    def reference_forward(self, reference: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See Strategy."""
        return self.forward(reference, batch)

    def full_weights(self, module: Any) -> State | None:
        """See Strategy; one parameter at a time."""
        first = dist.get_rank() == 0
        state: State = {}
        for name, value in named_tensors(module):
            full = value.full_tensor() if isinstance(value, DTensor) else value
            if first:
                state[name] = full.detach().to("cpu", copy=True)
        return state if first else None

    def load_weights(self, module: Any, state: State) -> None:
        """See Strategy."""
        own = dict(named_tensors(module))
        module.check_state(state, {name: tuple(value.shape) for name, value in own.items()})
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(as_sharded(value, own[name]))

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Whole tensors are cut as their parameters are."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        cut = {
            index: {
                key: as_sharded(value, parameters[index])
                if isinstance(value, Tensor) and value.shape == parameters[index].shape
                else value
                for key, value in kept.items()
            }
            for index, kept in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": cut})

    def save_shards(self, optimizers: Mapping[str, torch.optim.Optimizer], folder: Path) -> None:
        """See Strategy."""
        from rllib_gtpo.strategies.shards import save_optimizers

        save_optimizers(optimizers, folder)


def as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """`value`, cut as `like` is, without communication: everybody has all of it."""
    if not isinstance(like, DTensor):
        return value.to(like.device)
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
