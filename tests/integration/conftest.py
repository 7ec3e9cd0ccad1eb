"""Learner processes that are kept: starting one costs more than most tests do in it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import ray
from ray.rllib.core.learner import learner_group


class LearnerHost:
    """An actor in which one real learner after another lives; they share its process group."""

    def __init__(self) -> None:
        self.learner: Any = None

    def take(self, learner_class: Any, arguments: dict[str, Any]) -> None:
        self.learner = learner_class(**arguments)

    def drop(self) -> None:
        self.learner = None
        gc.collect()

    def build(self) -> None:
        self.learner.build()

    def _set_learner_index_and_placement_group(self, **chosen: Any) -> None:
        self.learner._set_learner_index_and_placement_group(**chosen)

    def apply(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self.learner.apply(func, *args, **kwargs)


class KeptProcesses:
    """Stands in for RLlib's executors of learners: the same processes for as many learners."""

    def __init__(self, executor: Any) -> None:
        self._make = executor
        self._running: dict[int, Any] = {}

    def executor(self, **arguments: Any) -> _Executor:
        return _Executor(self, arguments)

    def of(self, arguments: dict[str, Any]) -> Any:
        count = arguments["num_workers"]
        if count not in self._running:
            self._running[count] = self._make(**arguments)
            self._running[count].start(train_cls=LearnerHost)
        return self._running[count].worker_group

    def end(self) -> None:
        while self._running:
            self._running.popitem()[1].shutdown(graceful_termination=True)

    @property
    def ended(self) -> bool:
        return not self._running


class _Executor:
    def __init__(self, kept: KeptProcesses, arguments: dict[str, Any]) -> None:
        self._kept, self._arguments = kept, arguments

    def set_placement_group(self, group: Any) -> None:
        assert group is None, "learners in a placement group cannot be moved into other processes"

    def start(self, train_cls: Any, train_cls_kwargs: dict[str, Any]) -> None:
        self.worker_group = self._kept.of(self._arguments)
        self._on_all("take", train_cls, train_cls_kwargs)

    def shutdown(self, graceful_termination: bool) -> None:
        if not self._kept.ended:  # else RLlib's finalizer calls, of a group that was not shut down
            self._on_all("drop")

    def _on_all(self, method: str, *args: Any) -> None:
        actors = [worker.actor for worker in self.worker_group.workers]
        ray.get([getattr(actor, method).remote(*args) for actor in actors])


@pytest.fixture(scope="module")
def kept_learners(ray_session):
    """For modules with many groups of learners, none of which kills a process."""
    with pytest.MonkeyPatch.context() as patch:
        kept = KeptProcesses(learner_group.RLlibBackendExecutor)
        patch.setattr(learner_group, "RLlibBackendExecutor", kept.executor)
        yield
        kept.end()
