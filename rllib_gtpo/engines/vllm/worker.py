"""What runs inside vLLM's worker processes: how weights arrive there, and which log-probabilities
leave.

vLLM imports this module by name (`worker_extension_cls`) before it loads the model, and that
registers the transfer of weights through shared memory with vLLM's own factory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.v1.sample.sampler import Sampler

from rllib_gtpo.engines.vllm.settings import SHARED_MEMORY
from rllib_gtpo.engines.vllm.weights import read_shared


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class SharedMemoryUpdate(WeightTransferUpdateInfo):
    """See `rllib_gtpo.engines.vllm.weights.SharedWeights`."""

    path: str
    layout: list[Any] = field(default_factory=list)


class SharedMemoryTransfer(WeightTransferEngine[SharedMemoryInit, SharedMemoryUpdate]):
    """Loads weights that another process of this node has written to shared memory."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryUpdate

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Puts layers aside, to be loaded again one by one."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryUpdate) -> None:
        """Loads all weights of one update."""
        self.model.load_weights(read_shared(update_info.path, update_info.layout))

    def finish_weight_update(self) -> None:
        """Puts the layers back into service."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_output_head(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""


def repack_output_head(model: torch.nn.Module) -> None:
    """Makes the CPU kernel of a tied output head see the embedding's new values.

    It keeps a packed copy of the weight; the reload renews the copies of all layers but this one,
    which has no weight of its own to load.
    """
    head: Any = getattr(model, "lm_head", None)
    if hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


class WholeDistribution(torch.nn.Module):
    """A sampler that reports log-probabilities from before top-k and top-p cut the distribution."""

    def __init__(self, sampler: torch.nn.Module) -> None:
        super().__init__()
        self._sampler = sampler

    def forward(self, logits: torch.Tensor, generators: Any, k: Any, p: Any) -> Any:
        """Takes logits that are already divided by the temperature."""
        if k is None and p is None:
            return self._sampler(logits, generators, k, p)
        logprobs = logits.log_softmax(dim=-1, dtype=torch.float32)
        return self._sampler(logits, generators, k, p)[0], logprobs


class WorkerExtension:
    """Methods that vLLM adds to its workers."""

    model_runner: Any

    def report_whole_distribution(self) -> bool:
        """Installs `WholeDistribution`; False if this model runner has a sampler of its own."""
        sampler = getattr(self.model_runner, "sampler", None)
        if not isinstance(sampler, Sampler):
            return False
        if not isinstance(sampler.topk_topp_sampler, WholeDistribution):
            sampler.topk_topp_sampler = WholeDistribution(sampler.topk_topp_sampler)
        return True


if SHARED_MEMORY not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(SHARED_MEMORY, SharedMemoryTransfer)
