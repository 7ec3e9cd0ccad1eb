"""One vLLM engine as a Ray actor.

Requests and results travel in batches: a client submits what came up in one tick of its loop, and
its `collect` returns whatever has finished since.  A remote call for each would cost a third of
the throughput of a small model.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rllib_gtpo.engines.vllm.settings import SHARED_MEMORY, EngineSettings
from rllib_gtpo.engines.vllm.weights import Layout, SharedWeights, share
from rllib_gtpo.errors import ConfigError, EngineError


class Adapter(NamedTuple):
    """One version of a LoRA adapter.

    name, number: Its own, never used again: vLLM takes files of a known name for unchanged.
    path: A directory in PEFT's format; "": each engine has written one for itself.
    version: Of the policy's weights, if it is the policy's.
    """

    name: str
    number: int
    path: str
    version: int = 0


class Row(NamedTuple):
    """A request on its way to an engine; `number` is the client's name for it."""

    number: int
    token_ids: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    stop_token_ids: list[int]
    seed: int
    adapter: Adapter | None = None


class Sampled(NamedTuple):
    """What became of a request: a completion, or `error`."""

    number: int
    token_ids: list[int]
    logprobs: list[float]
    finish: str
    versions: list[str]  # of the weights that sampled the first token, ..., the last token
    cached_tokens: int = 0
    error: str | None = None


@dataclass
class _Session:
    """What an engine keeps for one client: its requests, and results that were not collected."""

    tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    results: list[Sampled] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False


class EngineActor:
    """Serves requests with vLLM's AsyncLLM, whose core runs in a process of its own."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._directory = tempfile.TemporaryDirectory(prefix="rllib-gtpo-engine-")
        self._engine: Any = None
        self._sessions: dict[str, _Session] = {}
        self._written: dict[int, Path] = {}  # adapters that came as files, by number
        self._update = asyncio.Lock()
        self._shared: SharedWeights | None = None
        self._dead: str | None = None

    async def start(self) -> tuple[str, int]:
        """Starts vLLM; the node of the engine and its process.

        Not in the constructor, whose errors ray would turn into text.
        """
        import ray

        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override the cache's size
        self._engine = self._build()
        if self._settings.truncates and not all(
            await self._engine.collective_rpc("report_whole_distribution")
        ):
            raise ConfigError(
                "top_p below 1 is not possible with this vLLM set-up: its log-probabilities are "
                "those of the truncated distribution. Use top_p=1.0, or engine='hf'."
            )
        if self._settings.weight_transfer == SHARED_MEMORY:
            await self.transfer("init_weight_transfer_engine", {})
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def _build(self) -> Any:
        # First what is ours to check: importing vLLM takes seconds.
        arguments = self._settings.arguments(Path(self._directory.name))
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig
        from vllm.v1.engine.async_llm import AsyncLLM

        transfer = WeightTransferConfig(backend=self._settings.weight_transfer)
        try:
            made = AsyncEngineArgs(**arguments, weight_transfer_config=transfer)
            return AsyncLLM.from_engine_args(made)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"vLLM refuses its settings: {error}") from error

    # Requests.

    async def submit(self, client: str, rows: list[Row]) -> None:
        """Starts on requests; `collect` gives their results."""
        session = self._sessions.setdefault(client, _Session())
        for row in rows:
            task = asyncio.get_running_loop().create_task(self._serve(client, session, row))
            session.tasks[row.number] = task

    async def collect(self, client: str) -> list[Sampled]:
        """What has finished since the last call, once there is anything."""
        session = self._sessions.setdefault(client, _Session())
        while not (session.results or session.ended or self._dead):
            session.news.clear()
            await session.news.wait()
        if self._dead:
            raise EngineError(self._dead)
        results, session.results = session.results, []
        return results

    async def abort(self, client: str, numbers: list[int]) -> None:
        """Stops requests; what they have sampled is lost."""
        session = self._sessions.get(client)
        for number in numbers:
            if session is not None and (task := session.tasks.pop(number, None)) is not None:
                task.cancel()  # AsyncLLM.generate aborts the request in the engine's core

    async def end_session(self, client: str) -> None:
        """Forgets a client."""
        session = self._sessions.pop(client, None)
        if session is not None:
            for task in session.tasks.values():
                task.cancel()
            session.ended = True
            session.news.set()

    async def _serve(self, client: str, session: _Session, row: Row) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            result = await self._generate(client, row)
        except EngineDeadError as error:
            self._die(f"the engine's core has died: {error}")
            return
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
            result = Sampled(row.number, [], [], "abort", [], error=failed)
        session.tasks.pop(row.number, None)
        session.results.append(result)
        session.news.set()

    async def _generate(self, client: str, row: Row) -> Sampled:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=min(row.max_tokens, self._settings.max_context - len(row.token_ids)),
            temperature=row.temperature,
            top_p=row.top_p,
            seed=row.seed,
            logprobs=0,
            ignore_eos=True,  # what ends a turn is the caller's stop_token_ids alone
            stop_token_ids=row.stop_token_ids,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = {"prompt_token_ids": row.token_ids}
        adapter = None if row.adapter is None else self._request_of(row.adapter)
        name = f"{client}-{row.number}"
        final: Any = None
        async for output in self._engine.generate(prompt, sampling, name, lora_request=adapter):
            final = output
        output = final.outputs[0]
        token_ids = list(output.token_ids)
        logprobs = [
            entry[token].logprob
            for entry, token in zip(output.logprobs or (), token_ids, strict=True)
        ]
        spans = sorted(output.weight_versions or (), key=lambda span: span.start)
        return Sampled(
            row.number,
            token_ids,
            logprobs,
            output.finish_reason or "abort",
            [span.version for span in spans if span.end > span.start],
            final.num_cached_tokens or 0,
        )

    def _die(self, reason: str) -> None:
        self._dead = reason
        for session in self._sessions.values():
            session.news.set()

    # Weights.

    async def share_weights(self, box: list[Any]) -> tuple[str, Layout]:
        """Fetches packed weights and writes them to this node's shared memory.

        box: The reference to them, boxed so that ray passes it on instead of the weights.
        """
        self.unshare_weights()
        self._shared = share(await box[0])
        return self._shared.path, self._shared.layout

    def unshare_weights(self) -> None:
        """Frees that memory."""
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    async def load_weights(self, path: str, layout: Layout, version: int) -> None:
        """Takes weights from shared memory.

        Requests in flight go on with the new weights after what they have sampled; their keys and
        values, and those of the prefix cache, are computed again.  If it raises, the engine may
        hold half of the new weights, and serves no more.
        """
        async with self._update:
            try:
                await self.pause()
                await self.transfer("start_weight_update")
                await self.transfer("update_weights", {"path": path, "layout": layout})
                await self.transfer("finish_weight_update", version)
                await self.resume()
            except Exception as error:
                self._die(f"weights of version {version} could not be loaded: {error}")
                raise EngineError(self._dead) from error

    async def transfer(self, step: str, info: Any = None) -> None:
        """One step of vLLM's weight transfer protocol."""
        from vllm.distributed.weight_transfer.base import (
            WeightTransferInitRequest,
            WeightTransferUpdateRequest,
        )

        if step == "init_weight_transfer_engine":
            await self._engine.init_weight_transfer_engine(WeightTransferInitRequest(info))
        elif step == "update_weights":
            await self._engine.update_weights(WeightTransferUpdateRequest(info))
        elif step == "finish_weight_update":
            await self._engine.finish_weight_update(weight_version=str(info))
        else:
            await self._engine.start_weight_update()

    async def pause(self) -> None:
        """Stops between two steps.  The caches go: they belong to weights that will change."""
        await self._engine.pause_generation(mode="keep", clear_cache=True)

    async def resume(self) -> None:
        """Goes on with the requests that were in flight."""
        await self._engine.resume_generation()

    async def load_adapter(
        self, adapter: Adapter, outdated: int | None, box: list[Any] | None = None
    ) -> None:
        """Loads a version of an adapter, and drops one that is not to be used any more.

        box: The reference to its files, unless they are at its path.
        """
        if box is not None:
            folder = Path(self._directory.name, adapter.name)
            folder.mkdir()
            for name, content in (await box[0]).items():
                (folder / name).write_bytes(content)
            self._written[adapter.number] = folder
        await self._engine.add_lora(self._request_of(adapter))
        if outdated is not None:
            await self._engine.remove_lora(outdated)
            if outdated in self._written:
                shutil.rmtree(self._written.pop(outdated))

    def _request_of(self, adapter: Adapter) -> Any:
        from vllm.lora.request import LoRARequest

        path = self._written.get(adapter.number, adapter.path)
        return LoRARequest(adapter.name, adapter.number, str(path))

    # Life.

    async def sleep(self, level: int) -> None:
        """Gives the device's memory back until `wake`; requests in flight are aborted."""
        await self._engine.sleep(level)

    async def wake(self, tags: list[str] | None = None) -> None:
        """Ends `sleep`, of all memory or only of that for "weights" or "kv_cache"."""
        await self._engine.wake_up(tags)

    async def check_health(self) -> None:
        """Raises if the engine cannot serve."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.check_health()
        except EngineDeadError as error:
            self._die(f"the engine's core has died: {error}")
        if self._dead:
            raise EngineError(self._dead)

    async def unfinished(self) -> int:
        """Requests that the engine still works on, those of clients that have left included."""
        return int(self._engine.output_processor.get_num_unfinished_requests())

    async def shutdown(self) -> None:
        """Ends the engine's processes and frees what they hold."""
        self._die("the engine was shut down")
        if self._engine is not None:
            self._engine.shutdown()
        self.unshare_weights()
        self._directory.cleanup()
