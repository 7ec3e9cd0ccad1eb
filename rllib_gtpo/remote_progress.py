"""How far remote runners are, while they are busy: each leaves its tally in Ray's key-value store
about once a second, and a thread of the driver adds them up.

An actor that counts would cost a process, and a runner that is rolling out answers no calls.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from rllib_gtpo.rollout_stats import Tally

EVERY_S = 1.0
_NAMESPACE = "rllib_gtpo_progress"


@dataclass
class Report:
    """Given to a runner: leaves its tally under a key."""

    key: str
    _last: float = field(default=0.0, repr=False)

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if now - self._last >= EVERY_S:
            self._last = now
            with suppress(Exception):  # never worth a rollout
                _internal_kv_put(self.key, json.dumps(asdict(tally)), namespace=_NAMESPACE)


@contextmanager
def remote_tallies(
    count: int, base: Tally, on_progress: Callable[[Tally], None] | None
) -> Iterator[list[Callable[[Tally], None] | None]]:
    """What each of `count` runners is to call; meanwhile `on_progress` gets `base` plus their sum.

    Without `on_progress` there is nothing to call.
    """
    if on_progress is None:
        yield [None] * count
        return
    prefix = f"{uuid.uuid4().hex}/"
    reports = [Report(f"{prefix}{index}") for index in range(count)]
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY_S):
            with suppress(Exception):
                found = [_internal_kv_get(r.key, namespace=_NAMESPACE) for r in reports]
                on_progress(sum((Tally(**json.loads(f)) for f in found if f), base))

    thread = threading.Thread(target=watch, name="rollout progress", daemon=True)
    thread.start()
    try:
        yield list(reports)
    finally:
        over.set()
        thread.join()
        with suppress(Exception):
            _internal_kv_del(prefix, del_by_prefix=True, namespace=_NAMESPACE)
