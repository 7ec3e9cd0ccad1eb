"""Leaving a long wait when a stop is asked for: machines that are taken away give notice of half a
minute, and a rollout may take many.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import ray

from rllib_gtpo.errors import Interrupted

LOOK_EVERY_S = 0.2
_LEFT = "stopped in the middle of a rollout; nothing of it is kept"

T = TypeVar("T")
Stop = Callable[[], bool]
"""Whether somebody has asked for a stop."""


async def unless_stopped(work: Coroutine[Any, Any, T], stop: Stop) -> T:
    """What `work` returns.

    Raises:
        Interrupted: `stop` said so before `work` was done, and it was cancelled.
    """
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.wait({task}, timeout=LOOK_EVERY_S)
        if not task.done() and stop():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise Interrupted(_LEFT, changed=False)
    return task.result()


def call_each(
    runners: Any, calls: Sequence[Callable[[Any], Any]], ids: Sequence[int], stop: Stop
) -> list[Any]:
    """What one call on each of some remote env runners returns, in the order of their ids; nothing
    of those that died.

    Args:
        runners: RLlib's EnvRunnerGroup.

    Raises:
        Interrupted: `stop` said so.  The runners go on with their calls, whose results are dropped.
            Until they answer again they count as lost, so that nothing else waits for them.
    """
    tag = uuid.uuid4().hex
    runners.foreach_env_runner_async(list(calls), tag=tag, remote_worker_ids=list(ids))
    results: list[tuple[int, Any]] = []
    manager = runners._worker_manager
    while manager.num_outstanding_async_reqs(tag):
        results += runners.fetch_ready_async_reqs(tags=tag, timeout_seconds=LOOK_EVERY_S)
        if stop():
            for number in ids:
                manager.set_actor_state(number, healthy=False)
            raise Interrupted(_LEFT, changed=False)
    return [result for _, result in sorted(results, key=lambda each: each[0])]


def end_lost(runners: Any) -> None:
    """Ends the env runners that count as lost; RLlib would wait for their answer first."""
    manager = runners._worker_manager
    for number in set(manager.actor_ids()) - set(manager.healthy_actor_ids()):
        ray.kill(manager.remove_actor(number))
