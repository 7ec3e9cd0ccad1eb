"""Idle daemon threads for synchronous tools.

Unlike those of `concurrent.futures`, they do not keep the interpreter from exiting, and a thread
that hangs is simply never seen again: it is not idle, so a new one takes its place.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from rllib_gtpo.errors import EnvironmentFault

_idle: deque[_Thread] = deque()
MAX_IDLE = 64
_NAME = "tool"


class _Thread:
    def __init__(self) -> None:
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=_NAME, daemon=True).start()

    def _run(self) -> None:
        while True:
            work = self.inbox.get()
            work()
            del work
            if len(_idle) >= MAX_IDLE:
                return
            _idle.append(self)


def start(fn: Callable[[], Any], loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any]:
    """Run `fn` in an idle or a new thread; the future is for the running loop alone.

    `fn` must not raise.  Whoever stops waiting for the future abandons the thread to `fn`.

    Raises:
        EnvironmentFault: The system gives no more threads.
    """
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(value: Any) -> None:
        if not future.done():
            future.set_result(value)

    def work() -> None:
        value = context.run(fn)
        try:
            loop.call_soon_threadsafe(deliver, value)
        except RuntimeError:
            return  # the loop was closed; nobody waits

    try:
        thread = _idle.pop()
    except IndexError:
        try:
            thread = _Thread()
        except RuntimeError as error:  # the limit of the system or of the container
            running = sum(t.name == _NAME for t in threading.enumerate())
            raise EnvironmentFault(
                f"There is no thread for a tool ({error}): {running} threads are running tools, "
                "perhaps some that never return.  Let these give up by themselves, or run what "
                "they do in a process, such as the sandbox; or lower max_concurrency."
            ) from error
    thread.inbox.put(work)
    return future


os.register_at_fork(after_in_child=_idle.clear)  # the parent's threads do not exist in the child
