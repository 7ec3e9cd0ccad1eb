"""A Learner whose model, optimizers and state are in the hands of a strategy.

RLlib's hooks for them are kept; what they do is the strategy's, so that the layers above do not
know how a model is spread over learners.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.rllib.core import COMPONENT_OPTIMIZER, DEFAULT_MODULE_ID
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.utils.framework import get_device
from torch import Tensor

from rllib_gtpo.engines.vllm import pack_state
from rllib_gtpo.engines.vllm.device import DeviceSender, Members
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.layers import checkpoint_activations, compile_layers
from rllib_gtpo.lora import adapter_files
from rllib_gtpo.strategies import Strategy
from rllib_gtpo.strategies.base import named_tensors

SUPERVISED = "supervised"  # the cold start's own optimizer, so that RL starts with a fresh state
POLICY = "policy"


class StrategyLearner(TorchLearner):
    """Builds, saves and hands out an LLMModule as its strategy says."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._strategy: Strategy = self.config.build_strategy()
        self._packed = False  # whether the model takes sequences without padding
        self._reference: Any = None
        self._lr_schedule = self.config.build_lr_schedule()
        self._updates = 0
        self.refusal: ConfigError | None = None
        self.best_weights: dict[str, Tensor] | None = None  # of a cold start, at the first learner
        self._sender: DeviceSender | None = None  # of weights to engines, if they go that way

    # RLlib's hooks.

    def build(self) -> None:
        """Builds as RLlib does, and seeds each learner's own generator."""
        device = get_device(self.config, self.config.num_gpus_per_learner)
        self._strategy.setup_process(self._rank, self._world, torch.device(device))
        super().build()
        self._gather_weights(self._unwrapped)
        if self.config.seed is not None:
            torch.manual_seed(self.config.seed + 1000 * self._rank)

    def _make_module(self) -> Any:
        """RLlib's, switched to packed batches and cut into shards before there are optimizers."""
        if self._strategy.master_weights:
            self._build_module_in_float32()
        module = super()._make_module()
        self._packed = module[DEFAULT_MODULE_ID].pack()
        if self.config.torch_compile:
            compile_layers(module[DEFAULT_MODULE_ID].model, self._device)
        if self.config.activation_checkpointing:
            checkpoint_activations(module[DEFAULT_MODULE_ID].model)
        if self._strategy.master_weights:
            module[DEFAULT_MODULE_ID].engine_dtype = torch.bfloat16
        self._strategy.shard(module[DEFAULT_MODULE_ID])
        if self._strategy.sharded:
            module[DEFAULT_MODULE_ID].sharding = self._strategy
        return module

    def _build_module_in_float32(self) -> None:
        spec = copy.deepcopy(self._module_spec)  # type: ignore[has-type]
        for of_module in spec.rl_module_specs.values():
            of_module.model_config = {**of_module.model_config, "dtype": "float32"}
        self._module_spec = spec

    def _make_modules_ddp_if_necessary(self) -> None:
        """Only if that is the strategy."""
        if self._strategy.name == "ddp" and not self._strategy.master_weights:
            super()._make_modules_ddp_if_necessary()

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """One optimizer for RL, following `lr`, and one for the cold start, driven step by step."""
        parameters = self._strategy.optimized(self.get_parameters(self._module[module_id]))
        optimizer = self.config.build_optimizer(parameters)
        self._strategy.prepare(self._module[module_id], optimizer)
        self.register_optimizer(
            module_id=module_id,
            optimizer_name=POLICY,
            optimizer=optimizer,
            params=parameters,
            lr_or_lr_schedule=config.lr,
        )
        if self._strategy.one_optimizer:
            return
        self.register_optimizer(
            module_id=module_id,
            optimizer_name=SUPERVISED,
            optimizer=torch.optim.AdamW(parameters, weight_decay=0.0),
            params=parameters,
        )

    def get_parameters(self, module: Any) -> Sequence[Any]:
        """Only what is trained."""
        return [p for p in module.parameters() if p.requires_grad]

    def _log_trainable_parameters(self) -> None:
        """Logged with each update instead: RLlib's one-off value is NaN in every later result."""

    # State.

    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """RLlib's state, plus random state, and reference and best weights if there are any.

        Of a sharded model the first learner has the whole weights; see `save_shards` for the rest.
        """
        left_out = _as_list(not_components)
        if self._strategy.sharded:
            left_out.append(COMPONENT_OPTIMIZER)
        state: dict[str, Any] = super().get_state(components, not_components=left_out, **kwargs)
        if components is None:
            state["torch_rng"] = torch.get_rng_state()
            state["updates"] = self._updates
            if self._reference is not None:
                state["reference"] = self._reference.get_state()
            if self.best_weights is not None:
                state["best_weights"] = self.best_weights
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """See `get_state`; learners other than the first continue with a generator of their own."""
        super().set_state(state)
        self._gather_weights(self._unwrapped)
        if self._rank == 0:
            self.best_weights = state.get("best_weights")
        self._updates = state.get("updates", self._updates)
        if "torch_rng" in state:
            torch.set_rng_state(state["torch_rng"])
            if self._rank:
                torch.manual_seed(torch.initial_seed() + self._rank)
        if "reference" in state:
            self._make_reference().set_state(state["reference"])
            self._gather_weights(self._reference)

    def restore_from_path(self, path: Any, **kwargs: Any) -> None:
        """RLlib's; but what a remote learner refuses RLlib only logs, so that it is kept for the
        algorithm to raise."""
        self.refusal = None
        try:
            super().restore_from_path(path, **kwargs)
        except ConfigError as error:
            if not self.config.num_learners:
                raise
            self.refusal = error

    def why_refused(self) -> ConfigError | None:
        """Of the last `restore_from_path`."""
        return self.refusal

    def _get_optimizer_state(self) -> dict[str, Any]:
        """Without RLlib's way through numpy, which loses bfloat16 and integer steps."""
        return {
            name: {
                "module_id": self._optimizer_name_to_module[name],
                "state": self._strategy.optimizer_state(optimizer),
            }
            for name, optimizer in self._named_optimizers.items()
        }

    def _set_optimizer_state(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            if name in self._named_optimizers:
                optimizer = self._named_optimizers[name]
                self._strategy.load_optimizer_state(optimizer, saved["state"])
        self._keep_own_lr()

    def _follow_lr_schedule(self) -> None:
        """Before each update, which it counts."""
        policy = self.get_optimizer(DEFAULT_MODULE_ID, POLICY)
        if self._lr_schedule is not None:
            self._set_optimizer_lr(policy, self.config.lr * self._lr_schedule.factor(self._updates))
        self._updates += 1

    def weight_shapes(self) -> dict[str, list[int]]:
        """Of the whole weights, by the names of `get_state`."""
        return {
            name: list(getattr(value, "ds_shape", value.shape))  # DeepSpeed cuts them at stage 3
            for name, value in named_tensors(self._unwrapped)
        }

    def _keep_own_lr(self) -> None:
        if isinstance(self.config.lr, float):  # a schedule goes on by itself; a number may be new
            self._set_optimizer_lr(self.get_optimizer(DEFAULT_MODULE_ID, POLICY), self.config.lr)

    def save_shards(self) -> dict[str, bytes]:
        """This learner's files of a sharded optimizer state; every learner is asked at once."""
        with tempfile.TemporaryDirectory() as folder:
            self._strategy.save_shards(self._named_optimizers, Path(folder))
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    def load_shards(self, files: dict[str, bytes]) -> None:
        """The files of all learners that saved; the weights are those of `set_state`."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._strategy.load_shards(self._unwrapped, self._named_optimizers, Path(folder))
        self._keep_own_lr()

    def _make_reference(self) -> Any:
        """A frozen copy of the module as it is now: the policy that KL is measured to."""

        def build() -> Any:
            module = self._module_spec.build()[DEFAULT_MODULE_ID].to(self._device)
            if self._packed:
                module.pack()
            return module

        self._reference = self._strategy.make_reference(self._unwrapped, build)
        self._reference.requires_grad_(False)
        self._gather_weights(self._reference)
        return self._reference

    def _gather_weights(self, module: Any) -> None:
        """For `get_state`, which is asked of the first learner alone."""
        if module.sharding is not None:
            module.whole = self._strategy.full_weights(module) or {}

    # Weights for engines.

    def publish_weights(self) -> tuple[int, Any] | None:
        """The version of the weights and a reference to them, packed for engines.

        With LoRA, to the files of the adapter.  From the first learner only: all have the same.
        """
        if self._rank:
            return None
        module = self._unwrapped
        state = module.get_state(inference_only=True)
        packed = adapter_files(module.peft_config, state) if self._lora else pack_state(state)
        return self._weights_seq_no, ray.put(packed)

    def send_weights(self, backend: str, pool: str, members: Members, workers: int) -> int:
        """Sends the weights from the learners' devices to the engines'; all learners take part.

        Returns their version.
        """
        if self._sender is None:
            self._sender = DeviceSender(backend, pool, self._unwrapped.model, self._rank)
        self._sender.send(members, workers, self._weights_seq_no)
        self._unwrapped.synced_bytes = sum(p.nbytes for p in self._unwrapped.parameters())
        return self._weights_seq_no

    def synced_bytes(self) -> int:
        """What the last sync gave to each rollout worker or engine."""
        return int(self._unwrapped.synced_bytes)

    def max_context(self) -> int:
        """Most tokens that the model's positions allow."""
        return int(self._unwrapped.max_context)

    # Who else is there.

    @property
    def _unwrapped(self) -> Any:
        return self.module[DEFAULT_MODULE_ID].unwrapped()

    @property
    def _lora(self) -> bool:
        return self.config.lora is not None

    @property
    def _world(self) -> int:
        return dist.get_world_size() if self.distributed and dist.is_initialized() else 1

    @property
    def _rank(self) -> int:
        return dist.get_rank() if self.distributed and dist.is_initialized() else 0

    def _sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over learners."""
        if self._world > 1:
            dist.all_reduce(tensor)
        return tensor

    def _gathered(self, values: set[int]) -> set[int]:
        """Of all learners."""
        if self._world == 1:
            return values
        parts: list[Any] = [None] * self._world
        dist.all_gather_object(parts, values)
        return set().union(*parts)

    def _max(self, count: int) -> int:
        if self._world == 1:
            return count
        tensor = torch.tensor(count, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
