"""An endless order over a data set, a function of seed and position, so that it resumes exactly."""

from __future__ import annotations

import random


class EndlessOrder:
    """`order[position]` is an index below `size`; each epoch is a shuffle of its own."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._epoch: tuple[int, list[int]] = (-1, [])

    def __getitem__(self, position: int) -> int:
        epoch, index = divmod(position, self._size)
        if epoch != self._epoch[0]:
            order = list(range(self._size))
            random.Random(f"{self._seed}-{epoch}").shuffle(order)
            self._epoch = (epoch, order)
        return self._epoch[1][index]
