"""The rollout engine of one env runner: a client of the engines that all env runners share.

Requests of one trajectory go to one engine, which has their prefix in its cache; a new trajectory
goes to the engine that has the fewest of this client's.  An engine that fails is reported to the
pool and its requests are sent again: to another engine, or to the one that replaces it.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import Counter
from typing import Any

from rllib_gtpo.engines.base import Request, check_request
from rllib_gtpo.engines.sampling import compute_stream
from rllib_gtpo.engines.vllm.actor import Adapter, Row, Sampled
from rllib_gtpo.errors import EngineError, GTPOError
from rllib_gtpo.types import Completion

PATIENCE_S = 300.0  # how long a request waits for an engine: a start takes seconds to minutes
RESENDS = 2  # of a request whose engine died; one that kills every engine must end
_MASK63 = (1 << 63) - 1


class EngineDown(Exception):
    """The engine of a request has failed, and the request with it."""


class Session:
    """This client's requests at one engine, on one event loop."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.name = uuid.uuid4().hex
        self._pending: dict[int, asyncio.Future[Sampled]] = {}
        self._outbox: list[Row] = []
        self._numbers = itertools.count()
        self._collector: asyncio.Task[None] | None = None

    async def call(self, request: Request, adapter: Adapter | None = None) -> Sampled:
        """Raises EngineDown if the engine fails meanwhile."""
        loop = asyncio.get_running_loop()
        sampling, number = request.sampling, next(self._numbers)
        future = self._pending[number] = loop.create_future()
        if not self._outbox:
            loop.call_soon(self._send)
        self._outbox.append(
            Row(
                number,
                list(request.token_ids),
                sampling.max_tokens,
                sampling.temperature,
                sampling.top_p if sampling.temperature > 0 else 1.0,
                list(sampling.stop_token_ids),
                compute_stream(request.key) & _MASK63,
                adapter,
            )
        )
        if self._collector is None:
            self._collector = loop.create_task(self._collect())
        try:
            return await future
        except asyncio.CancelledError:
            if self._pending.pop(number, None) is not None:
                self._withdraw(number)
            raise

    def end(self) -> None:
        """Ends what is left of the session at the engine."""
        self.engine.actor.end_session.remote(self.name)

    def _send(self) -> None:
        rows, self._outbox = self._outbox, []
        if rows:
            self.engine.actor.submit.remote(self.name, rows)

    def _withdraw(self, number: int) -> None:
        before = len(self._outbox)
        self._outbox = [row for row in self._outbox if row.number != number]
        if len(self._outbox) == before:
            self.engine.actor.abort.remote(self.name, [number])
        if not self._pending and self._collector is not None:
            self._collector.cancel()

    async def _collect(self) -> None:
        try:
            while self._pending:
                for sampled in await self.engine.actor.collect.remote(self.name):
                    future = self._pending.pop(sampled.number, None)
                    if future is not None and not future.done():
                        future.set_result(sampled)
        except asyncio.CancelledError:
            # A call of `collect` may be waiting there still, and would swallow what comes next.
            self.end()
            self.name = uuid.uuid4().hex
        except Exception as error:  # whatever it is, this engine did not answer
            self._fail(error)
        finally:
            self._collector = None

    def _fail(self, error: Exception) -> None:
        self._outbox = []
        pending, self._pending = self._pending, {}
        for future in pending.values():
            if not future.done():
                future.set_exception(EngineDown(f"{type(error).__name__}: {error}"))


class VLLMEngine:
    """Implements `RolloutEngine` over the engines of a pool.

    Args:
        pool: The pool's name, or a handle on its actor.
        max_context: most tokens of a context and its completion, as the engines were started with.
        vocab_size: rows of the model's output head.
        patience_s: how long a request may wait for an engine to be (re)started.
        adapter: what `EnginePool.load_adapter` gave, for all requests; None samples from the model
            itself.
        follows_policy: sample with the newest adapter of `EnginePool.update_adapter` instead.
    """

    def __init__(
        self,
        pool: Any,
        *,
        max_context: int,
        vocab_size: int,
        patience_s: float = PATIENCE_S,
        adapter: Adapter | None = None,
        follows_policy: bool = False,
    ) -> None:
        self.adapter = adapter
        self._follows_policy = follows_policy
        self._newest: asyncio.Future[Adapter] | None = None
        self.max_context = max_context
        self.cached_tokens = 0  # of contexts that the engines found in their prefix caches
        self._vocab_size = vocab_size
        self._pool = _find(pool) if isinstance(pool, str) else pool
        self._patience_s = patience_s
        self._sessions: dict[int, Session] = {}  # by engine
        self._homes: dict[str, int] = {}  # trajectory -> engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._joining: asyncio.Future[None] | None = None
        self._closed = False

    async def generate(self, request: Request) -> Completion:
        """Samples one completion; see `RolloutEngine.generate`.

        Raises:
            ValueError: the request cannot be served; the message says what to change.
            EngineError: no engine could serve it in time, or each one that tried failed.
        """
        if self._closed:
            raise EngineError("the engine is closed: make a new one")
        check_request(request, self.max_context, self._vocab_size)
        self._attach(asyncio.get_running_loop())
        failures: list[str] = []
        while len(failures) <= RESENDS:
            session = await self._session_of(request.trajectory)
            try:
                adapter = await self._adapter_now()
                sampled = await session.call(request, adapter)
            except EngineDown as down:
                failures.append(str(down))
                self._report(session, str(down))
                continue
            if sampled.error is not None:
                raise EngineError(f"vLLM did not take a request: {sampled.error}")
            if sampled.finish == "abort":  # not by us: the engine was put to sleep
                failures.append("the engine aborted it")
                continue
            self.cached_tokens += sampled.cached_tokens
            return to_completion(sampled, adapter if self._follows_policy else None)
        raise EngineError(
            f"a request of {len(request.token_ids)} tokens failed {len(failures)} times: "
            f"{failures[-1]}"
        )

    def release(self, trajectory: str) -> None:
        """Forgets a trajectory; its prefix leaves the engine's cache when room is needed."""
        self._homes.pop(trajectory, None)

    def weights_updated(self, version: int) -> None:
        """Engines stamp what they sample; a new adapter has to be asked for."""
        self._newest = None

    def close(self) -> None:
        """Ends the requests of this client; the engines are the pool's."""
        self._closed = True
        for session in self._sessions.values():
            session.end()
            session._fail(EngineError("the engine was closed"))
        self._sessions.clear()

    async def _adapter_now(self) -> Adapter | None:
        if not self._follows_policy:
            return self.adapter
        if self._newest is None:
            self._newest = asyncio.ensure_future(self._ask(self._pool.policy_adapter.remote()))
        return await asyncio.shield(self._newest)

    def _attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sessions belong to one event loop, and each batch of rollouts has its own."""
        if self._loop is loop:
            return
        for session in self._sessions.values():
            session.end()
        self._sessions = {i: Session(s.engine) for i, s in self._sessions.items()}
        self._loop, self._joining, self._newest = loop, None, None

    async def _session_of(self, trajectory: str) -> Session:
        while not self._sessions:
            await self._join()
        home = self._homes.get(trajectory)
        if home not in self._sessions:
            load = Counter(self._homes.values())
            home = self._homes[trajectory] = min(self._sessions, key=lambda i: (load[i], i))
        return self._sessions[home]

    async def _join(self) -> None:
        """Asks the pool which engines serve; once for all requests that wait."""
        if self._joining is None or self._joining.done():
            self._joining = asyncio.ensure_future(self._enter(self._pool.engines.remote()))
        await asyncio.shield(self._joining)

    async def _ask(self, answer: Any) -> Any:
        """What the pool answers, in time."""
        try:
            return await asyncio.wait_for(answer, self._patience_s)
        except TimeoutError:
            raise EngineError(
                f"no vLLM engine served within {self._patience_s:g} s: it is still starting, has "
                "not been given weights yet, or there are too few resources for it"
            ) from None
        except Exception as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, GTPOError):
                raise cause from None
            raise EngineError(f"the vLLM engines are gone: {error}") from error

    async def _enter(self, answer: Any) -> None:
        for engine in await self._ask(answer):
            known = self._sessions.get(engine.index)
            if known is None or known.engine.generation < engine.generation:
                self._sessions[engine.index] = Session(engine)

    def _report(self, session: Session, reason: str) -> None:
        """Leaves a dead engine, and has the pool replace it; others serve meanwhile."""
        engine = session.engine
        if self._sessions.get(engine.index) is session:
            del self._sessions[engine.index]
            answer = self._pool.replace.remote(engine.index, engine.generation, reason)
            waiting = asyncio.ensure_future(self._enter(answer))
            waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
            if not self._sessions:
                self._joining = waiting


def to_completion(sampled: Sampled, policy: Adapter | None = None) -> Completion:
    """A completion with the versions of the weights that sampled it; `policy`: its adapter."""
    if policy is not None:
        return Completion(sampled.token_ids, sampled.logprobs, sampled.finish, policy.version)
    versions = [int(v) if v.isdigit() else 0 for v in sampled.versions] or [0]
    return Completion(
        sampled.token_ids,
        sampled.logprobs,
        sampled.finish,
        versions[0],
        versions[-1] if versions[-1] != versions[0] else None,
    )


def _find(name: str) -> Any:
    import ray

    try:
        return ray.get_actor(name)
    except ValueError as error:
        raise EngineError(
            "no vLLM engines are running for this configuration: an algorithm starts them when it "
            "is built, and EnginePool.start does without one"
        ) from error
