"""What a Learner asks of a strategy, and the two that keep the whole model in every learner."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rllib_gtpo.errors import ConfigError, GTPOError, did_you_mean
from rllib_gtpo.strategies.master import (
    Masters,
    average_gradients,
    make_masters,
    round_into_module,
)

State = dict[str, Tensor]
Shards = dict[str, bytes]  # the files that a learner writes for a checkpoint, by name


class Strategy:
    """The whole model in one process ("single"), and the interface of the others.

    Every method but `shard`, `prepare` and `backward` may be collective: all learners call it.
    """

    name: ClassVar[str] = "single"
    options: ClassVar[Mapping[str, Any]] = {}  # names and defaults of `strategy_options`
    sharded: ClassVar[bool] = False  # whether a learner holds only its part
    one_optimizer: ClassVar[bool] = False  # whether the cold start must share the policy's
    own_masters: ClassVar[bool] = False  # whether it keeps float32 weights by itself

    def __init__(
        self, options: Mapping[str, Any] | None = None, *, master_weights: bool = False
    ) -> None:
        """master_weights: The model is given in float32, and computes in bfloat16."""
        given = dict(options or {})
        for key in given:
            if key not in self.options:
                raise ConfigError(
                    f"strategy_options: {key!r} is unknown to strategy={self.name!r}"
                    f"{did_you_mean(key, self.options)}."
                )
        self.chosen: dict[str, Any] = {**self.options, **given}
        self.master_weights = master_weights
        self._masters: Masters = {}

    def setup_process(self, rank: int, world: int, device: torch.device) -> None:
        """Before anything is built."""

    def shard(self, module: Any) -> None:
        """Before optimizers are made over the module's parameters."""
        if self.master_weights:
            self._masters = module.masters = make_masters(module)

    def optimized(self, parameters: Sequence[Any]) -> list[Any]:
        """What an optimizer of these parameters of the module steps on."""
        return [self._masters.get(parameter, parameter) for parameter in parameters]

    def prepare(self, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """After the policy's optimizer was made."""

    def forward(self, module: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The module's training forward pass."""
        output: dict[str, Tensor] = module.forward_train(batch)
        return output

    def synchronised(self, module: Any, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward and backward pass: gradients are complete after the last one."""
        return contextlib.nullcontext()

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first backward pass of a step."""
        optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`; gradients are averaged over learners."""
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None) -> float:
        """Clips by global norm and steps, unless the norm is not finite; the norm before."""
        if self._masters:
            average_gradients(list(self._masters.values()))
        parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if not parameters:
            return 0.0
        total = torch.nn.utils.clip_grad_norm_(parameters, clip or float("inf"))
        norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
        if norm == norm and norm != float("inf"):
            optimizer.step()
            round_into_module(self._masters)
        optimizer.zero_grad(set_to_none=True)
        return norm

    # State.

    def full_weights(self, module: Any) -> State | None:
        """The whole weights on the CPU, at the first learner of a sharded strategy."""
        return None

    def load_weights(self, module: Any, state: State) -> None:
        """Takes whole weights."""
        module.set_state(state)

    def make_reference(self, module: Any, build: Callable[[], Any]) -> Any:
        """A copy of the module as it is now; `build` makes a new one of the same kind."""
        without: Any = {id(module.masters): {}}
        return copy.deepcopy(module, without)

    def reference_forward(self, reference: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`forward` of what `make_reference` made."""
        output: dict[str, Tensor] = reference.forward_train(batch)
        return output

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Of an unsharded strategy."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """A state of `optimizer_state`, perhaps of another strategy."""
        optimizer.load_state_dict(copy.deepcopy(state))

    def save_shards(self, optimizers: Mapping[str, torch.optim.Optimizer], folder: Path) -> None:
        """Writes this learner's part of the optimizers' state."""
        raise GTPOError(f"strategy {self.name!r} has no shards")

    def load_shards(
        self, module: Any, optimizers: Mapping[str, torch.optim.Optimizer], folder: Path
    ) -> None:
        """Reads what `save_shards` of any number of learners wrote."""
        from rllib_gtpo.strategies.shards import load_optimizers

        load_optimizers(optimizers, folder)


class DDP(Strategy):
    """The whole model in every learner; gradients are averaged in the last backward pass."""

    name = "ddp"

    def synchronised(self, module: Any, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """See Strategy."""
        if last or not isinstance(module, DistributedDataParallel):
            return contextlib.nullcontext()
        return module.no_sync()


STRATEGIES = ("auto", "single", "ddp", "fsdp2", "deepspeed")


def strategy_name(name: str, num_learners: int) -> str:
    """What "auto" stands for."""
    if name != "auto":
        return name
    return "ddp" if num_learners > 1 else "single"


def build_strategy(
    name: str,
    options: Mapping[str, Any],
    num_learners: int,
    dtype: str = "float32",
    *,
    master_weights: bool = False,
) -> Strategy:
    """The strategy of that name.

    Raises:
        ConfigError: it is unknown, does not go with so many learners, or lacks its package.
    """
    if name not in STRATEGIES:
        raise ConfigError(
            f"strategy={name!r} is unknown: use one of {', '.join(STRATEGIES)}"
            f"{did_you_mean(name, STRATEGIES)}."
        )
    name = strategy_name(name, num_learners)
    if name == "single" and num_learners > 1:
        raise ConfigError(
            f"strategy='single' is for one learner, not for num_learners={num_learners}: use "
            "'ddp', or 'fsdp2' or 'deepspeed' for a model that is too large for one."
        )
    if name == "ddp" and num_learners < 2:
        raise ConfigError("strategy='ddp' needs num_learners of 2 or more; 'single' is for one.")
    if name in ("fsdp2", "deepspeed") and num_learners < 1:
        raise ConfigError(
            f"strategy={name!r} needs learners in processes of their own: set num_learners to 1 "
            "or more."
        )
    if name == "fsdp2":
        from rllib_gtpo.strategies.fsdp2 import FSDP2

        return FSDP2(options, master_weights=master_weights)
    if name == "deepspeed":
        from rllib_gtpo.strategies.zero import ZeRO

        return ZeRO(options, dtype)
    whole = DDP if name == "ddp" else Strategy
    return whole(options, master_weights=master_weights)


def named_tensors(module: Any) -> list[tuple[str, Tensor]]:
    """Parameters and saved buffers, tied ones once, under the names of `get_state`.

    Those of the adapter only, if the module has one.
    """
    seen: set[int] = set()
    found = []
    for name, value in module.state_dict(keep_vars=True).items():
        wanted = module.adapter_names is None or name in module.adapter_names
        if wanted and id(value) not in seen:
            seen.add(id(value))
            found.append((name, value))
    return found


def own_group(device: torch.device) -> None:
    """A process group for a learner that is alone, unless there is one already."""
    if not dist.is_initialized():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore(),
            rank=0,
            world_size=1,
        )
