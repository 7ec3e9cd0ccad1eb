"""The engines of a run: started, updated, watched and replaced in one place.

The place is a Ray actor of its own, found by name, so that many env runners may report one dead
engine and it is replaced once.  It ends with the process that started it, and the engines with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from rllib_gtpo.engines.vllm.actor import Adapter, EngineActor
from rllib_gtpo.engines.vllm.device import Members, place_of
from rllib_gtpo.engines.vllm.settings import (
    SHARED_MEMORY,
    VERSIONS_OF_ADAPTER,
    EngineSettings,
)
from rllib_gtpo.engines.vllm.weights import Layout
from rllib_gtpo.errors import ConfigError, EngineError

logger = logging.getLogger(__name__)

START_ATTEMPTS = 3  # to replace an engine
HEALTH_EVERY_S = 10.0
HEALTH_TIMEOUT_S = 120.0
SHUTDOWN_S = 15.0
_POLICY = "policy"  # the adapter that is trained


@dataclass(frozen=True)
class Engine:
    """A serving engine; `generation` counts the replacements of its place."""

    index: int
    generation: int
    actor: Any
    node: str
    pid: int


@dataclass
class PoolReport:
    """What has become of the engines so far."""

    serving: int
    replaced: int
    version: int | None
    engines: list[Engine] = field(default_factory=list)


class PoolActor:
    """Holds the engines and the current weights."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._serving: dict[int, Engine] = {}
        self._waiting: dict[int, Engine] = {}  # for the next update from the learners' devices
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._generation: dict[int, int] = {}
        self._weights: tuple[int, list[Any]] | None = None
        self._layout: Layout | None = None  # of the first weights, and of all others
        self._have_weights = asyncio.Event()
        self._lock = asyncio.Lock()  # held while weights change or an engine joins
        self._replaced = 0
        self._adapters: dict[str, list[Adapter]] = {}  # the versions that may be in use
        self._adapter_count = 0
        self._policy: tuple[Adapter, list[Any]] | None = None

    async def start(self) -> None:
        """Starts all engines, and returns at once."""
        for index in range(self._settings.num_engines):
            self._start(index, attempts=1)
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def engines(self) -> list[Engine]:
        """The engines that serve, once there are weights to serve with."""
        await self._have_weights.wait()
        if not self._serving:
            await asyncio.gather(*self._starting.values())
        return list(self._serving.values())

    async def replace(self, index: int, generation: int, reason: str) -> list[Engine]:
        """Puts a new engine in the place of one that failed, and returns when it serves.

        Of several reports of the same engine, the first one has an effect.
        """
        self._give_up(index, generation, reason)
        if index in self._starting:
            await asyncio.shield(self._starting[index])
        return list(self._serving.values())

    def _give_up(self, index: int, generation: int, reason: str) -> None:
        engine = self._serving.get(index)
        if engine is None or engine.generation != generation:
            return
        logger.warning("engine %d is replaced: %s", index, reason)
        del self._serving[index]
        self._replaced += 1
        ray.kill(engine.actor)
        self._start(index, attempts=START_ATTEMPTS)

    def _start(self, index: int, attempts: int) -> None:
        task = asyncio.get_running_loop().create_task(self._try_start(index, attempts))
        self._starting[index] = task
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _try_start(self, index: int, attempts: int) -> None:
        for attempt in range(1, attempts + 1):
            try:
                await self._start_once(index)
                return
            except Exception as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, ConfigError):
                    raise cause from error
                logger.error("engine %d did not start, attempt %d: %s", index, attempt, error)
                if attempt == attempts:
                    raise EngineError(
                        f"vLLM engine {index} did not start: {error}\nThe log of its process says "
                        "more; the usual reason is memory: see engine_config's "
                        "gpu_memory_utilization and kv_cache_memory_bytes."
                    ) from error

    async def _start_once(self, index: int) -> None:
        generation = self._generation[index] = self._generation.get(index, -1) + 1
        resources = self._settings.resources()
        actor = (
            ray.remote(EngineActor)
            .options(
                num_cpus=resources.pop("CPU"),
                num_gpus=resources.pop("GPU", 0),
                max_concurrency=2000,
                runtime_env={"env_vars": self._settings.environment()},
                **self._settings.place(index),
            )
            .remote(self._settings)
        )
        try:
            node, pid = await actor.start.remote()
            engine = Engine(index, generation, actor, node, pid)
            async with self._lock:
                if self._settings.weight_transfer != SHARED_MEMORY:
                    self._waiting[index] = engine
                    return
                if self._weights is not None:
                    failed = await self._push([engine], *self._weights)
                    if failed:
                        raise failed[engine]
                if self._policy is not None:
                    adapter, box = self._policy
                    await actor.load_adapter.remote(adapter, None, box)
                self._serving[index] = engine
        except BaseException:
            ray.kill(actor)
            raise

    async def _watch(self) -> None:
        """Finds engines that die while nobody talks to them."""
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            for engine in list(self._serving.values()):
                try:
                    check = engine.actor.check_health.remote()
                    await asyncio.wait_for(check, HEALTH_TIMEOUT_S)
                except Exception as error:
                    self._give_up(engine.index, engine.generation, str(error))

    # Weights.

    async def update_weights(self, version: int, box: list[Any]) -> None:
        """Gives all engines new weights; engines that start later get the newest.

        An engine that fails meanwhile is replaced.

        box: The reference to packed weights, in a list so that ray does not fetch them here.

        Raises:
            EngineError: the weights are those of another model, or no engine could load them; the
                engines go on with the weights they had.
        """
        if self._weights is None:  # the first start: its errors are the caller's
            await asyncio.gather(*self._starting.values())
        async with self._lock:
            failed = await self._push(list(self._serving.values()), version, box)
            if self._any_took(failed):
                self._weights = (version, box)
                self._have_weights.set()

    async def update_adapter(self, version: int, box: list[Any]) -> None:
        """Gives all engines a new adapter of the policy; engines that start later get the newest.

        An engine that fails meanwhile is replaced.

        box: The reference to its files, in a list so that ray does not fetch them here.

        Raises:
            EngineError: no engine could load it.
        """
        if self._policy is None:  # the first start: its errors are the caller's
            await asyncio.gather(*self._starting.values())
        async with self._lock:
            adapter, versions, outdated = self._next_version(_POLICY, "", version)
            engines = list(self._serving.values())
            results = await asyncio.gather(
                *(e.actor.load_adapter.remote(adapter, outdated, box) for e in engines),
                return_exceptions=True,
            )
            if self._any_took(
                {e: r for e, r in zip(engines, results, strict=True) if r is not None}
            ):
                self._adapters[_POLICY] = versions
                self._policy = (adapter, box)
                self._have_weights.set()

    async def policy_adapter(self) -> Adapter:
        """What the policy is sampled with, once there is anything."""
        await self._have_weights.wait()
        assert self._policy is not None
        return self._policy[0]

    def _any_took(self, failed: Mapping[Engine, Any]) -> bool:
        """Whether what was given to all serving engines holds now; those that failed are replaced.

        Raises:
            EngineError: all of them failed.
        """
        loaded = len(failed) < len(self._serving) or not self._serving
        for engine, error in failed.items():
            self._give_up(engine.index, engine.generation, str(error))
        if not loaded:
            raise EngineError(f"no engine took new weights: {next(iter(failed.values()))}")
        return True

    async def _push(
        self, engines: list[Engine], version: int, box: list[Any]
    ) -> dict[Engine, BaseException]:
        """Returns the engines that failed, and why."""
        by_node: dict[str, list[Engine]] = {}
        for engine in engines:
            by_node.setdefault(engine.node, []).append(engine)
        results = await asyncio.gather(
            *(self._push_to_node(group, version, box) for group in by_node.values())
        )
        return {engine: error for result in results for engine, error in result.items()}

    async def _push_to_node(
        self, engines: list[Engine], version: int, box: list[Any]
    ) -> dict[Engine, BaseException]:
        """The weights cross to a node once: one of its engines shares them with the others."""
        failed: dict[Engine, BaseException] = {}
        for writer in engines:
            try:
                path, layout = await writer.actor.share_weights.remote(box)
            except Exception as error:
                failed[writer] = error
                continue
            self._check_layout(layout)
            readers = [e for e in engines if e not in failed]
            results = await asyncio.gather(
                *(e.actor.load_weights.remote(path, layout, version) for e in readers),
                return_exceptions=True,
            )
            with contextlib.suppress(ray.exceptions.RayError):
                await writer.actor.unshare_weights.remote()
            failed |= {
                e: r for e, r in zip(readers, results, strict=True) if isinstance(r, BaseException)
            }
            break
        return failed

    def _check_layout(self, layout: Layout) -> None:
        """Refuses weights that would leave an engine half loaded."""
        if self._layout is None:
            self._layout = layout
        for new, old in itertools.zip_longest(layout, self._layout):
            if new != old:
                raise EngineError(
                    f"the new weights belong to another model: they have {new and new[:3]} where "
                    f"the engines have {old and old[:3]}"
                )

    # Weights that do not come this way: see device.py.

    async def begin_update(self) -> Members:
        """Pauses all engines for an update, and those that have just started join it."""
        if not self._serving:
            await asyncio.gather(*self._starting.values())
        await self._lock.acquire()
        try:
            await asyncio.gather(*(e.actor.pause.remote() for e in self._updating()))
        except BaseException:
            self._lock.release()
            raise
        return [(e.index, e.generation) for e in self._updating()]

    async def transfer(self, step: str, info: Any) -> None:
        """One step of vLLM's weight transfer protocol at all engines at once."""
        engines = self._updating()
        infos = [info] * len(engines)
        if step == "init_weight_transfer_engine":
            workers = self._settings.workers
            infos = [place_of(info, place, workers) for place in range(len(engines))]
        await asyncio.gather(
            *(e.actor.transfer.remote(step, i) for e, i in zip(engines, infos, strict=True))
        )

    async def end_update(self, done: bool) -> None:
        """Goes on with new weights; engines that may hold half of them are replaced."""
        engines = self._updating()
        try:
            self._serving |= self._waiting
            self._waiting.clear()
            if done:
                await asyncio.gather(*(e.actor.resume.remote() for e in engines))
                self._have_weights.set()
            else:
                for engine in engines:
                    self._give_up(engine.index, engine.generation, "an update failed")
        finally:
            self._lock.release()

    def _updating(self) -> list[Engine]:
        engines = self._serving | self._waiting
        return [engines[index] for index in sorted(engines)]

    async def call_all(self, method: str, *args: Any) -> list[Any]:
        """Calls a method of every serving engine, none of which may join meanwhile."""
        async with self._lock:
            engines = [self._serving[index] for index in sorted(self._serving)]
            return list(
                await asyncio.gather(*(getattr(e.actor, method).remote(*args) for e in engines))
            )

    async def load_adapter(self, name: str, path: str) -> Adapter:
        """Loads a new version of a LoRA adapter into all engines.

        Requests in flight keep the version that they began with; the one before that is dropped.
        """
        limit = self._settings.adapters
        if name not in self._adapters and len(self._adapters) >= limit:
            raise ConfigError(
                f"adapter {name!r} is one too many: the engines were started for {limit} at once; "
                "set engine_config to {'enable_lora': True, 'max_loras': ..., 'max_lora_rank': ...}"
            )
        adapter, versions, outdated = self._next_version(name, path)
        await self.call_all("load_adapter", adapter, outdated)
        self._adapters[name] = versions
        return adapter

    def _next_version(
        self, name: str, path: str, version: int = 0
    ) -> tuple[Adapter, list[Adapter], int | None]:
        """A new version of an adapter, all that are in use with it, and the number of the one that
        is to be dropped for it."""
        self._adapter_count += 1
        adapter = Adapter(f"{name}@{self._adapter_count}", self._adapter_count, path, version)
        versions = [*self._adapters.get(name, []), adapter]
        outdated = versions.pop(0).number if len(versions) > VERSIONS_OF_ADAPTER else None
        return adapter, versions, outdated

    # Life.

    async def report(self) -> PoolReport:
        """Counts for metrics and tests."""
        version = self._weights[0] if self._weights else None
        version = self._policy[0].version if self._policy else version
        engines = list(self._serving.values())
        return PoolReport(len(engines), self._replaced, version, engines)

    async def shutdown(self) -> None:
        """Ends all engines."""
        self._watcher.cancel()
        for task in self._starting.values():
            task.cancel()
        engines = list(self._serving.values())
        self._serving.clear()
        ends = asyncio.gather(*(e.actor.shutdown.remote() for e in engines), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ends, SHUTDOWN_S)
        for engine in engines:
            ray.kill(engine.actor)
