"""Supervised training by all learners: steps, the loss on held-out demonstrations, and the weights
that had the lowest.

Everything that a resumed run must know is in `Supervised` and in the first learner's state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rllib_gtpo.cold_start import ColdStart, Demonstrations
from rllib_gtpo.errors import Interrupted
from rllib_gtpo.progress import Progress


@dataclass
class Supervised:
    """How far supervised training is.

    losses: on held-out demonstrations, by the number of steps before each.
    best_steps: after how many steps the lowest of them was measured.
    stale: how many have been measured since.
    """

    steps: int = 0
    losses: dict[int, float] = field(default_factory=dict)
    best_steps: int | None = None
    stale: int = 0

    @property
    def best_loss(self) -> float:
        """NaN before there is one."""
        return math.nan if self.best_steps is None else self.losses[self.best_steps]

    @property
    def last_loss(self) -> float:
        """NaN before there is one."""
        return next(reversed(self.losses.values()), math.nan)

    def finished(self, start: ColdStart) -> bool:
        """Whether all steps are done, or too many looks in a row saw nothing better."""
        waited = start.patience is not None and self.stale >= start.patience
        return self.steps >= start.steps or waited

    def record(self, loss: float) -> bool:
        """Notes a loss on held-out demonstrations; whether it is the lowest so far."""
        better = not math.isnan(loss) and not loss >= self.best_loss
        self.losses[self.steps] = loss
        self.stale = 0 if better else self.stale + 1
        if better:
            self.best_steps = self.steps
        return better

    def note(self, loss: float) -> str:
        """For a progress bar, with the loss of the last step."""
        if self.best_steps is None:
            return f"loss {loss:.3f}"
        return (
            f"loss {loss:.3f}, held-out {self.last_loss:.3f}, "
            f"best {self.best_loss:.3f} after {self.best_steps}"
        )

    def metrics(self, prefix: str) -> dict[str, float]:
        """Under their slash names."""
        return {
            f"{prefix}/steps": float(self.steps),
            f"{prefix}/validation_loss": self.last_loss,
            f"{prefix}/best_validation_loss": self.best_loss,
            f"{prefix}/best_steps": math.nan if self.best_steps is None else float(self.best_steps),
        }


def supervise(
    learner_group: Any,
    data: Demonstrations,
    start: ColdStart,
    made: Supervised,
    until: int,
    *,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
) -> list[float]:
    """Goes on from where `made` is until so many steps are done, or training has finished.

    When it has finished, the learners have the weights of the lowest loss on held-out
    demonstrations; without any, those of the last step.

    Returns:
        The loss of each step.

    Raises:
        Interrupted: `stop`, which is asked between steps, said so.
    """
    losses: list[float] = []
    if made.finished(start):
        return losses
    while made.steps < until and not made.finished(start):
        batch = data.batch(made.steps, start.batch_size)
        settings = start.lr_at(made.steps), start.grad_clip
        losses.append(call_learners(learner_group, "supervised_step", batch, *settings)[0])
        made.steps += 1
        if (
            start.validates_after(made.steps - 1)
            and data.validation
            and made.record(validation_loss(learner_group, data))
        ):
            call_learners(learner_group, "keep_best_weights")
        progress.step(note=made.note(losses[-1]))
        if stop() and not made.finished(start):
            raise Interrupted(f"stopped after step {made.steps} of the cold start")
    if made.finished(start):
        if made.best_steps is not None:
            box = [call_learners(learner_group, "publish_best_weights")[0]]
            call_learners(learner_group, "take_weights", box)
        call_learners(learner_group, "end_supervision")
    return losses


def validation_loss(learner_group: Any, data: Demonstrations) -> float:
    """Mean next-token loss on all demonstrations that were held out, over all learners; NaN if
    there are none."""
    if not data.validation:
        return math.nan
    loss: float = call_learners(learner_group, "supervised_loss", data.validation)[0]
    return loss


def call_learners(learner_group: Any, method: str, *args: Any) -> list[Any]:
    """Calls a method on every learner at once, and raises what any of them raised."""
    results = learner_group.foreach_learner(lambda learner: getattr(learner, method)(*args))
    for result in results:
        if not result.ok:
            raise result.get()
    return [result.get() for result in results]
