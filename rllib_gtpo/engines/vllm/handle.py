"""The driver's handle on the engines of a run."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from rllib_gtpo.engines.vllm.actor import Adapter
from rllib_gtpo.engines.vllm.device import Members
from rllib_gtpo.engines.vllm.pool import SHUTDOWN_S, PoolActor, PoolReport
from rllib_gtpo.engines.vllm.settings import EngineSettings
from rllib_gtpo.errors import ConfigError, EngineError


class EnginePool:
    """The driver's handle on the engines.

    Example:
        pool = EnginePool.start(EngineSettings.of(config))
        pool.update_weights(version, ray.put(pack_state(state)))
        engine = VLLMEngine(pool.name, ...)      # in any process of the cluster
        pool.stop()
    """

    def __init__(self, name: str, actor: Any, settings: EngineSettings) -> None:
        self.name = name
        self.settings = settings
        self._actor = actor

    @classmethod
    def start(cls, settings: EngineSettings) -> EnginePool:
        """Starts engines in the background; the first `update_weights` waits for them."""
        name = f"rllib_gtpo_engines_{uuid.uuid4().hex}"
        actor = (
            ray.remote(PoolActor)
            .options(name=name, num_cpus=0, max_concurrency=2000)
            .remote(settings)
        )
        ray.get(actor.start.remote())
        return cls(name, actor, settings)

    def update_weights(self, version: int, packed: ray.ObjectRef) -> None:
        """Gives all engines the weights that `pack_state` made, as a reference to them."""
        _get(self._actor.update_weights.remote(version, [packed]))

    def update_adapter(self, version: int, files: ray.ObjectRef) -> None:
        """Has all engines sample the policy with a new adapter: a reference to its files."""
        _get(self._actor.update_adapter.remote(version, [files]))

    @contextlib.contextmanager
    def device_update(self) -> Iterator[Members]:
        """Holds the engines while learners send them weights from their devices."""
        members = _get(self._actor.begin_update.remote())
        done = False
        try:
            yield members
            done = True
        finally:
            _get(self._actor.end_update.remote(done))

    def report(self) -> PoolReport:
        """What has become of the engines so far."""
        report: PoolReport = _get(self._actor.report.remote())
        return report

    def load_adapter(self, name: str, path: str | Path) -> Adapter:
        """Loads a LoRA adapter, or a new version of it, for `VLLMEngine(adapter=...)`.

        path: A directory in PEFT's format that every node can read.
        """
        loaded: Adapter = _get(self._actor.load_adapter.remote(name, str(path)))
        return loaded

    def pause(self) -> None:
        """Holds all engines between two steps; requests in flight wait."""
        _get(self._actor.call_all.remote("pause"))

    def resume(self) -> None:
        """Ends `pause`."""
        _get(self._actor.call_all.remote("resume"))

    def sleep(self, level: int = 1) -> None:
        """Gives device memory back until `wake`: the cache, and weights with it at level 2.

        Requests in flight are aborted.  A CPU build frees nothing.
        """
        _get(self._actor.call_all.remote("sleep", level))

    def wake(self, tags: list[str] | None = None) -> None:
        """Ends `sleep`, of all memory or only of that for "weights" or "kv_cache".

        After level 2, update the weights before anything is sampled.
        """
        _get(self._actor.call_all.remote("wake", tags))

    def stop(self) -> None:
        """Ends engines and pool; nothing of them is left on any node."""
        with contextlib.suppress(ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            ray.get(self._actor.shutdown.remote(), timeout=2 * SHUTDOWN_S)
        ray.kill(self._actor)


def _get(reference: Any) -> Any:
    """`ray.get`, with our own errors as they were raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, (ConfigError, EngineError)):
            raise cause from None
        raise
