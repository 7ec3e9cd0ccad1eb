"""Which task has which position: of an endless shuffled stream, or of an evaluation's split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rllib_gtpo.errors import DataError
from rllib_gtpo.shuffling import EndlessOrder
from rllib_gtpo.types import Task


class TaskStream:
    """The tasks of an environment by position; each split is read once.

    Args:
        tasks: Gives the rows of a split.
        environment: Its name, for messages.
        split: The one that is meant where none is named.
        seed: Of the order in training; None in an evaluation, which takes tasks as they come.
    """

    def __init__(
        self,
        tasks: Callable[[str], Iterable[Task]],
        environment: str,
        split: str,
        seed: int | None,
    ) -> None:
        self._tasks, self._environment = tasks, environment
        self._split, self._seed = split, seed
        self._rows: dict[str, list[Task]] = {}
        self.order: Sequence[int] | EndlessOrder | None = None  # of the rows; made when needed

    def find(self, position: int, split: str | None = None) -> Task | str:
        """The task at a position, or why there is none."""
        split = split or self._split
        rows = self._rows_of(split)
        if self._seed is not None:
            self.order = self.order or EndlessOrder(len(rows), self._seed)
            return rows[self.order[position]]
        return rows[position] if position < len(rows) else f"{split!r} has only {len(rows)} tasks"

    def _rows_of(self, split: str) -> list[Task]:
        if split not in self._rows:
            rows = list(self._tasks(split))
            if not rows:
                raise DataError(
                    f"{self._environment}.tasks({split!r}) has no rows: check the data, or set "
                    "evaluation(split=...) to a split that exists."
                )
            self._rows[split] = rows
        return self._rows[split]
