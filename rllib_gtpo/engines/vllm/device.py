"""Weights from the learners' devices straight to those of the engines.

vLLM does the sending, with NCCL (`weight_transfer: nccl`, devices of their own) or CUDA IPC (`ipc`,
learners and engines on the same devices); here is what it asks of the engines, and when.

Both need GPUs and were written against vLLM's source without one: the tests run this module's order
of calls, not the two transports.
"""

from __future__ import annotations

import socket
from typing import Any

import ray

Members = list[tuple[int, int]]
"""Engine and generation of all that take part in an update."""


class PoolClient:
    """The engines of a pool, as vLLM's sending side wants to see them: as one."""

    def __init__(self, pool: Any) -> None:
        self.version = 0  # of the weights that are sent next
        self._pool = pool

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Has the workers of all engines meet the sender; blocks until they have."""
        self._call("init_weight_transfer_engine", init_info)

    def start_weight_update(self) -> None:
        """See vLLM's VLLMWeightSyncClient."""
        self._call("start_weight_update", None)

    def update_weights(self, update_info: Any) -> None:
        """Has all workers receive; blocks until they have."""
        self._call("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Puts the weights into service under their version."""
        self._call("finish_weight_update", weight_version or self.version)

    def _call(self, step: str, info: Any) -> None:
        ray.get(self._pool.transfer.remote(step, info))


class DeviceSender:
    """A learner's part; each learner has one, and the first one sends.

    Args:
        backend: "nccl" or "ipc".
        pool: The name of the pool's actor.
        model: The learner's Hugging Face model.
        rank: Of the learner.
    """

    def __init__(self, backend: str, pool: str, model: Any, rank: int) -> None:
        self.client = PoolClient(ray.get_actor(pool))
        self._backend, self._model, self._rank = backend, model, rank
        self._trainer: Any = None
        self._members: Members | None = None

    def send(self, members: Members, workers: int, version: int) -> None:
        """Sends all weights to paused engines.

        members: Who takes part; if others than the last time, all of them meet anew.
        workers: Of one engine.
        """
        from vllm.distributed.weight_transfer.base import ModuleSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        self.client.version = version
        if members != self._members:
            if self._trainer is not None:
                self._trainer.shutdown()
            self._trainer = WeightTransferTrainerFactory.trainer_init(
                self._init_info(1 + len(members) * workers),
                client=self.client,
                source=ModuleSource(self._model),
            )
            self._members = members
        self._trainer.send_weights()

    def _init_info(self, world_size: int) -> Any:
        if self._backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            return IPCTrainerInitInfo(rank=self._rank)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            master_address=ray.util.get_node_ip_address(),
            master_port=_free_port(),
            world_size=world_size,
            rank=self._rank,
        )


def place_of(info: dict[str, Any], place: int, workers: int) -> dict[str, Any]:
    """What one engine needs to know to meet the sender; `place`: its number among the engines.

    The sender has rank 0 of the group, and each worker a rank of its own behind it.
    """
    if "rank_offset" not in info:
        return info
    return {**info, "rank_offset": info["rank_offset"] + place * workers}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])
