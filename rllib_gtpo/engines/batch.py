"""Step-level continuous batching: which trajectories run, in which row, with which cache.

Everything here is synchronous; `hf.py` drives it from an event loop.  The order of rows follows
from the order of calls alone, so that equal calls in equal order repeat bit for bit.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import PreTrainedModel

from rllib_gtpo.engines.base import SamplingParams
from rllib_gtpo.engines.kv_cache import BatchCache, Saved, WaitingCaches
from rllib_gtpo.engines.model_runner import ModelRunner
from rllib_gtpo.engines.rows import Part
from rllib_gtpo.engines.sampling import compute_uniforms, sample_tokens
from rllib_gtpo.types import Completion

_GROUP_WASTE = 64  # tokens of padding per row that are cheaper than a part of its own


@dataclass(slots=True)
class EngineStats:
    """Counters since the last reset."""

    tokens: int = 0  # sampled
    steps: int = 0
    rows: int = 0  # sum over the steps of the rows that sampled a token
    forwards: int = 0  # prefill and decode
    prefill_computed: int = 0  # context tokens that went through the model
    prefill_reused: int = 0  # context tokens that a cache, or an equal context in the step, held
    evictions: int = 0  # caches dropped for want of room

    @property
    def mean_batch(self) -> float:
        """Rows per step."""
        return self.rows / max(self.steps, 1)


@dataclass(slots=True, eq=False)
class Call:
    """A pending request.  `ids` is the context and what was sampled so far."""

    name: str
    ids: list[int]
    sampling: SamplingParams
    stream: int  # see `sampling.compute_stream`
    limit: int  # `ids` ends here at the latest
    future: asyncio.Future[Completion]
    logprobs: list[float] = field(default_factory=list)
    version: int = 0  # of the weights that sampled the first token
    keep: bool = True  # False: the trajectory was released meanwhile


@dataclass(slots=True)
class _Fresh:
    """A call on its way into the batch, with the tokens that its cache does not cover."""

    call: Call
    ids: np.ndarray
    start: int  # tokens that the cache covers
    saved: Saved | None
    new: np.ndarray


class Batch:
    """The rows of an engine.  Constructor arguments as those of `HFEngine`."""

    def __init__(
        self,
        model: PreTrainedModel,
        max_context: int,
        max_batch: int,
        cache_tokens: int,
        prefill_tokens: int,
    ) -> None:
        self.max_batch = max_batch
        self.cache_tokens = cache_tokens
        self.prefill_tokens = prefill_tokens
        self.version = 0
        self.stats = EngineStats()
        self.calls: dict[str, Call] = {}  # queued and active, by trajectory
        self.returning: set[str] = set()  # completed in the last step, and not heard of since
        self._cache = BatchCache(max_batch, max_context, cache_tokens)
        self._runner = ModelRunner(model, self._cache, prefill_tokens)
        self._saved = WaitingCaches()
        self._queue: deque[Call] = deque()
        self._active: list[Call] = []  # index = row of the cache

    @property
    def full(self) -> bool:
        """Whether the calls that are here need every row."""
        return len(self.calls) >= self.max_batch

    def submit(self, call: Call) -> None:
        """Queues a call for the next step."""
        self.calls[call.name] = call
        self.returning.discard(call.name)
        self._queue.append(call)

    def release(self, name: str) -> None:
        """Forgets the cache of a trajectory; its call, if one is pending, still completes."""
        self._saved.pop(name)
        self.returning.discard(name)
        if name in self.calls:
            self.calls[name].keep = False

    def drop_caches(self) -> None:
        """Forgets all caches; active calls go back to the queue, ahead of the others."""
        self._queue.extendleft(reversed(self._active))
        self._active = []
        self._saved.clear()
        self._cache.clear()

    def clear(self) -> list[Call]:
        """Forgets everything; returns the calls that were pending."""
        calls = list(self.calls.values())
        self.returning.clear()
        self.drop_caches()
        self._queue.clear()
        self.calls.clear()
        return calls

    def purge(self) -> None:
        """Removes calls that were cancelled."""
        if any(call.future.done() for call in self._queue):
            gone = [call for call in self._queue if call.future.done()]
            self._queue = deque(call for call in self._queue if not call.future.done())
            for call in gone:
                del self.calls[call.name]
        for row in reversed(range(len(self._active))):
            if self._active[row].future.done():
                self._remove(row)

    def step(self) -> None:
        """Admits, computes and samples one token for each row, and completes what is finished."""
        self.returning.clear()
        self.purge()
        running = list(self._active)
        fresh = self._admit()
        self._active += [f.call for f in fresh]
        if not self._active:
            return
        with self._runner.inference(len(running) + sum(len(f.new) for f in fresh)):
            self._cache.reserve(
                len(self._active),
                columns=max(len(call.ids) for call in self._active),
                live=len(running),
                limit=max(call.limit for call in self._active),
            )
            logits = self._compute(running, fresh)
            tokens, logprobs = sample_tokens(
                logits,
                [call.sampling.temperature for call in self._active],
                [call.sampling.top_p for call in self._active],
                compute_uniforms(
                    [call.stream for call in self._active], [len(c.ids) for c in self._active]
                ),
            )
        self.stats.steps += 1
        self.stats.rows += len(tokens)
        self._record(tokens, logprobs)

    def _admit(self) -> list[_Fresh]:
        """Takes from the queue what there is room for, makes the room, finds reusable caches."""
        rows, columns = len(self._active), max((c.limit for c in self._active), default=0)
        fresh = []
        while self._queue and rows < self.max_batch:
            wider = max(columns, self._queue[0].limit)
            if rows and (rows + 1) * wider > self.cache_tokens:
                break
            rows, columns = rows + 1, wider
            call = self._queue.popleft()
            ids = np.array(call.ids, dtype=np.int64)
            saved = self._saved.pop(call.name)
            start = min(saved.common_prefix(ids), len(ids) - 1) if saved else 0
            if not call.logprobs:
                call.version = self.version
            fresh.append(_Fresh(call, ids, start, saved, ids[start:]))
        self.stats.evictions += self._saved.shrink(self.cache_tokens - rows * columns)
        return fresh

    def _compute(self, running: list[Call], fresh: list[_Fresh]) -> torch.Tensor:
        """Logits in the order of rows, which this settles for those of `fresh`.

        Of these, rows with equal contexts and no cache, such as the first turns of a group, are
        computed once and copied.  Others stand in order of length.
        """
        first, parts = len(running), []
        if running:
            positions = [len(call.ids) - 1 for call in running]
            parts.append(Part.one_each([call.ids[-1] for call in running], positions))
        leaders: dict[bytes, _Fresh] = {}
        copies: list[tuple[_Fresh, _Fresh]] = []
        alone: list[_Fresh] = []
        for f in fresh:
            if f.start or leaders.setdefault(f.ids.tobytes(), f) is f:
                alone.append(f)
            else:
                copies.append((f, leaders[f.ids.tobytes()]))
        alone.sort(key=lambda f: len(f.new))
        self._active[first:] = [f.call for f in alone] + [f.call for f, _ in copies]
        for row, f in enumerate(alone, first):
            if f.saved is not None and f.start:
                self._cache.load(row, f.saved.blocks, f.start)
        begin = 0
        while begin < len(alone):
            end = self._part_end(alone, begin)
            part = alone[begin:end]
            parts.append(Part.of(first + begin, [f.new for f in part], [f.start for f in part]))
            begin = end
        forwards = self._runner.forwards
        logits = self._runner.compute(parts)
        self.stats.forwards += self._runner.forwards - forwards
        self.stats.prefill_computed += sum(len(f.new) for f in alone)
        self.stats.prefill_reused += sum(f.start for f in alone)
        if copies:
            row_of = {id(f): row for row, f in enumerate(alone, first)}
            sources = [row_of[id(leader)] for _, leader in copies]
            for i, (f, _) in enumerate(copies):
                self._cache.copy(sources[i], first + len(alone) + i, len(f.ids))
                self.stats.prefill_reused += len(f.ids)
            logits = torch.cat((logits, logits[sources]))
        return logits

    def _part_end(self, fresh: list[_Fresh], begin: int) -> int:
        """Where the part that starts at `begin` of the sorted rows ends."""
        shortest = len(fresh[begin].new)
        for end in range(begin + 1, len(fresh)):
            longest = len(fresh[end].new)
            if (end + 1 - begin) * longest > self.prefill_tokens:
                return end
            if longest - shortest > _GROUP_WASTE:
                return end
        return len(fresh)

    def _record(self, tokens: list[int], logprobs: list[float]) -> None:
        finished = []
        for row, (call, token, logprob) in enumerate(
            zip(self._active, tokens, logprobs, strict=True)
        ):
            call.ids.append(token)
            call.logprobs.append(logprob)
            stop = token in call.sampling.stop_token_ids
            if stop or len(call.ids) >= call.limit:
                finished.append((row, "stop" if stop else "length"))
        self.stats.tokens += len(tokens)
        for row, finish in finished:
            call = self._active[row]
            sampled = call.ids[len(call.ids) - len(call.logprobs) :]
            last = self.version if self.version != call.version else None
            call.future.set_result(Completion(sampled, call.logprobs, finish, call.version, last))
            self.returning.add(call.name)
        for row, _ in reversed(finished):
            self._remove(row)

    def _remove(self, row: int) -> None:
        """Takes a row out of the batch, keeps its cache, fills the hole with the last row."""
        call, last = self._active[row], len(self._active) - 1
        covered = len(call.ids) - 1  # the last token has not been through the model
        if call.keep:
            ids = np.array(call.ids[:covered], dtype=np.int64)
            self._saved.put(call.name, Saved(ids, self._cache.store(row, covered)))
        moved = self._active.pop()
        if row != last:
            self._cache.copy(last, row, len(moved.ids) - 1)
            self._active[row] = moved
        del self.calls[call.name]
