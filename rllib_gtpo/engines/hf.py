"""The in-process rollout engine: continuous batching over a plain transformers causal LM.

Limits first.  One event loop, one thread: a forward blocks the loop, and tools proceed between
forwards.  Layers must keep plain keys and values of full attention; `check_model` refuses others.

Each step admits new requests, runs their *new* tokens and the last ones of the rows already running
through the model in one forward, samples one token for each row, and lets finished rows go.  The
cache of a trajectory stays after its turn, so that the next turn computes only what is new.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

from transformers import PreTrainedModel

from rllib_gtpo.engines.base import Request, check_request
from rllib_gtpo.engines.batch import Batch, Call, EngineStats
from rllib_gtpo.engines.model_runner import check_model
from rllib_gtpo.engines.sampling import compute_stream
from rllib_gtpo.errors import ConfigError, EngineError
from rllib_gtpo.types import Completion

__all__ = ["EngineStats", "HFEngine"]

_SETTLE = 16  # turns of the loop that a trajectory gets to come back with its next request
_PATIENCE = 0.15  # of the time of a step, for those whose tools run in other processes


class HFEngine:
    """Implements `RolloutEngine` over a model in this process.

    Calls made in one tick of the loop enter the batch together and in the order of the calls.  A
    completion during which the weights changed carries the version it began with.  Cancelling
    `generate` takes its row out of the batch before the next step.

    Args:
        model: a causal LM with eager or sdpa attention.  It may be trained between steps by others,
            who then call `weights_updated`; each step restores the model's mode and attention.
        max_context: most tokens of a context and its completion.
        max_batch: most rows of a step; further requests wait, first come first served.
        cache_tokens: most tokens whose keys and values are kept, the running batch (its rows times
            the longest that one of them may become) included.  When it is full, the caches that
            waited longest go, and new requests wait.  None: 2**18, or 4 * max_context if more.
        prefill_tokens: most tokens of one prefill forward, padding included.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_context: int,
        max_batch: int = 256,
        cache_tokens: int | None = None,
        prefill_tokens: int = 4096,
    ) -> None:
        if cache_tokens is None:
            cache_tokens = max(1 << 18, 4 * max_context)
        if max_context < 2 or max_batch < 1 or prefill_tokens < 1:
            raise ConfigError("max_context must be >= 2, max_batch and prefill_tokens >= 1")
        if cache_tokens < max_context:
            raise ConfigError(
                f"cache_tokens={cache_tokens} cannot hold one trajectory: raise it to at least "
                f"max_context={max_context}"
            )
        check_model(model, max_context)
        self.max_context = max_context
        self._vocab_size = model.get_input_embeddings().weight.shape[0]
        self._batch = Batch(model, max_context, max_batch, cache_tokens, prefill_tokens)
        self._task: asyncio.Task[None] | None = None
        self._all_back = asyncio.Event()  # of those that completed in the last step
        self._closed = False

    async def generate(self, request: Request) -> Completion:
        """Samples one completion; see `RolloutEngine.generate`.

        Raises:
            ValueError: the request cannot be served; the message says what to change.
            EngineError: a forward failed, the engine is closed or in use on another event loop, or
                the trajectory has another call pending.
        """
        self._check(request)
        loop = asyncio.get_running_loop()
        self._attach(loop)
        if request.trajectory in self._batch.calls:
            self._batch.purge()  # a call that was cancelled is still there
        if request.trajectory in self._batch.calls:
            raise EngineError(
                f"trajectory {request.trajectory!r} has a call pending: await it first, or give "
                "each rollout a name of its own"
            )
        ids, sampling = list(request.token_ids), request.sampling
        call = Call(
            name=request.trajectory,
            ids=ids,
            sampling=sampling,
            stream=compute_stream(request.key),
            limit=min(len(ids) + sampling.max_tokens, self.max_context),
            future=loop.create_future(),
        )
        self._batch.submit(call)
        self._heard()
        if self._task is None:
            self._task = loop.create_task(self._run())
        return await call.future

    def release(self, trajectory: str) -> None:
        """Forgets a trajectory; a call of it that is pending still completes."""
        self._batch.release(trajectory)
        self._heard()

    def weights_updated(self, version: int) -> None:
        """Drops all caches; running completions go on, their tokens prefilled again."""
        self._batch.version = version
        self._batch.drop_caches()

    def close(self) -> None:
        """Frees the caches and fails pending calls with EngineError.  Safe to call twice."""
        self._closed = True
        self._fail("the engine was closed", None)

    @property
    def stats(self) -> EngineStats:
        """A copy of the counters."""
        return replace(self._batch.stats)

    def reset_stats(self) -> EngineStats:
        """Returns the counters and starts them at zero."""
        stats, self._batch.stats = self._batch.stats, EngineStats()
        return stats

    def _check(self, request: Request) -> None:
        if self._closed:
            raise EngineError("the engine is closed: make a new one")
        check_request(request, self.max_context, self._vocab_size)

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Makes sure that a task left over from another event loop is not mistaken for ours."""
        if self._task is None or self._task.get_loop() is loop:
            return
        if self._task.get_loop().is_running():
            raise EngineError("the engine is in use on another event loop: use one per loop")
        self._batch.clear()  # that loop has stopped, and nobody waits for its calls any more
        self._task = None

    async def _run(self) -> None:
        """Steps until nothing is pending."""
        try:
            while self._batch.calls:
                began = time.perf_counter()
                try:
                    self._batch.step()
                except Exception as error:
                    self._fail(f"a step failed: {type(error).__name__}: {error}", error)
                await self._settle(_PATIENCE * (time.perf_counter() - began))
        except BaseException as error:
            if self._batch.calls:
                self._fail("the engine's task was stopped", error)
            raise
        finally:
            self._task = None

    async def _settle(self, patience: float) -> None:
        """Gives way to the loop, as long as trajectories that have just got their completion may
        come back at once, and then for `patience` seconds at the most, unless others fill the step.

        Without this, one whose tool takes no time misses the steps that its few turns of the loop
        take; and one whose tool takes little has its prefill in a forward of its own, while the
        tool competes with the step for the cores.
        """
        for _ in range(_SETTLE):
            await asyncio.sleep(0)
            if not self._batch.returning:
                return
        if self._batch.full:
            return
        self._all_back = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_back.wait(), patience)

    def _heard(self) -> None:
        """Ends the wait of `_settle` if nobody is missing any more."""
        if not self._batch.returning:
            self._all_back.set()

    def _fail(self, reason: str, cause: BaseException | None) -> None:
        for call in self._batch.clear():
            if not call.future.done():
                error = EngineError(
                    f"{reason}; {len(call.logprobs)} tokens of a completion are lost"
                )
                error.__cause__ = cause
                call.future.set_exception(error)
