"""DeepSpeed ZeRO: optimizer state (1), gradients (2) and parameters (3) spread over learners."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from rllib_gtpo.errors import ConfigError, GTPOError
from rllib_gtpo.strategies.base import State, Strategy, named_tensors, own_group

_TAG = "learners"
_BUCKET = 500_000_000  # elements; DeepSpeed's default


class ZeRO(Strategy):
    """`strategy_options`: stage (1, 2, 3), offload (optimizer state, and at stage 3 parameters,
    wait in CPU memory), config (DeepSpeed's own, merged into ours).

    DeepSpeed keeps one optimizer for the module, so the cold start uses the policy's.
    """

    name = "deepspeed"
    options: ClassVar[Mapping[str, Any]] = {"stage": 2, "offload": False, "config": {}}
    sharded = True
    one_optimizer = True
    own_masters = True

    def __init__(self, options: Mapping[str, Any] | None = None, dtype: str = "float32") -> None:
        super().__init__(options)
        if self.chosen["stage"] not in (1, 2, 3):
            raise ConfigError(f"strategy_options: stage={self.chosen['stage']!r}: use 1, 2 or 3.")
        if importlib.util.find_spec("deepspeed") is None:
            raise ConfigError(
                "strategy='deepspeed' needs the package deepspeed: pip install "
                "'rllib-gtpo[deepspeed]', or use strategy='fsdp2', which needs nothing."
            )
        self.dtype = dtype
        self._engine: Any = None

    def setup_process(self, rank: int, world: int, device: torch.device) -> None:
        """DeepSpeed reads its place from the environment."""
        own_group(device)
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        if device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")

    def prepare(self, module: Any, optimizer: torch.optim.Optimizer) -> None:
        """See Strategy."""
        import deepspeed

        # DeepSpeed takes whole buckets of 2 GB, and touches them at each step, for any small model.
        bucket = min(_BUCKET, sum(p.numel() for p in module.parameters()))
        zero: dict[str, Any] = {
            "stage": self.chosen["stage"],
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        }
        if self.chosen["offload"]:
            zero["offload_optimizer"] = {"device": "cpu"}
            if self.chosen["stage"] == 3:
                zero["offload_param"] = {"device": "cpu"}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # `step` is what ends an accumulation
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "bf16": {"enabled": self.dtype == "bfloat16"},
        }
        config = _merged(config, self.chosen["config"])
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, dist_init_required=False, config=config
        )
        for name, buffer in module.named_buffers():
            buffer.data = buffers[name]  # it makes rotary frequencies bfloat16, too
        self._zero = self._engine.optimizer
        self._zero.check_grad_overflow = True  # else NaN would be stepped on in float32

    def forward(self, module: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Through the engine."""
        output: dict[str, Tensor] = self._engine(batch)
        return output

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        """See Strategy."""
        self._zero.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """See Strategy."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, optimizer: torch.optim.Optimizer, clip: float | None) -> float:
        """See Strategy."""
        self._zero.clip_grad = clip or 0.0
        self._engine.step()
        if self._zero.overflow:
            return float("nan")
        return float(self._engine.get_global_grad_norm())

    # State.

    def full_weights(self, module: Any) -> State | None:
        """See Strategy; one parameter at a time."""
        first = dist.get_rank() == 0
        state: State = {}
        for name, value in named_tensors(module):
            with self._gathered(value):
                if first:
                    state[name] = value.detach().to("cpu", copy=True)
        return state if first else None

    def load_weights(self, module: Any, state: State) -> None:
        """See Strategy; the float32 copy that DeepSpeed steps on must follow."""
        own = dict(named_tensors(module))
        shapes = {n: tuple(getattr(v, "ds_shape", v.shape)) for n, v in own.items()}
        module.check_state(state, shapes)
        with torch.no_grad():
            for name, value in state.items():
                with self._gathered(own[name], writes=True):
                    if not hasattr(own[name], "ds_id") or dist.get_rank() == 0:
                        own[name].copy_(value)
        self._zero.refresh_fp32_params()

    def make_reference(self, module: Any, build: Callable[[], Any]) -> Any:
        """See Strategy; whole in every learner."""
        reference = build()
        with torch.no_grad():
            for new, old in zip(reference.parameters(), module.parameters(), strict=True):
                with self._gathered(old):
                    new.copy_(old)
        return reference

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """DeepSpeed's optimizer is over flat slices: a state by parameter does not go into it."""
        raise ConfigError(
            "The checkpoint's optimizer state is not DeepSpeed's: continue with the strategy that "
            "wrote it, or `rllib export` the weights and start a new run with model= that "
            "directory."
        )

    def save_shards(self, optimizers: Mapping[str, torch.optim.Optimizer], folder: Path) -> None:
        """See Strategy; without the base of an adapter, which does not change."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)

    def load_shards(
        self, module: Any, optimizers: Mapping[str, torch.optim.Optimizer], folder: Path
    ) -> None:
        """Of as many learners at the same stage only."""
        frozen = module.adapter_names is not None
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=not frozen)
        if path is None:
            raise GTPOError(f"DeepSpeed found no checkpoint in {folder}")

    def _gathered(self, parameter: Tensor, *, writes: bool = False) -> Any:
        if not hasattr(parameter, "ds_id"):  # stage 3 marks what it cuts
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if writes else None)


def _merged(ours: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(ours)
    for key, value in theirs.items():
        nested = isinstance(value, Mapping) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if nested else value
    return out
