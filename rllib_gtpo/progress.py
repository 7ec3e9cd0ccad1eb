"""Progress for people: bars on a terminal, a line now and then where there is none."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from types import TracebackType

from tqdm import tqdm

from rllib_gtpo.rollout_stats import Tally

_LINE_EVERY_S = 30.0


def can_draw() -> bool:
    """Whether standard error is a terminal on which a line can be drawn again."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def draw_bars_only_on_terminals() -> None:
    """Of transformers, whose bars would be lines without end in a file."""
    from transformers.utils import logging

    if not can_draw():
        logging.disable_progress_bar()


class Progress:
    """A bar over `total` steps; without a terminal it prints a line every half minute instead."""

    def __init__(self, label: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self._label, self._total, self._done = label, total, start
        self._enabled = enabled
        self._note = ""
        self._printed = time.monotonic()
        terminal = enabled and can_draw()
        self._bar = (
            tqdm(
                total=total,
                initial=start,
                desc=label,
                leave=False,
                dynamic_ncols=True,
                mininterval=0.1,
            )
            if terminal
            else None
        )

    def step(self, count: int = 1, note: str = "") -> None:
        """Moves on; `note` is shown behind the bar."""
        self._done += count
        self._note = note or self._note
        if self._bar is not None:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._printed > _LINE_EVERY_S:
            self._printed = time.monotonic()
            line = f"{self._label}: {self._done}/{self._total} {self._note}".rstrip()
            with suppress(BrokenPipeError):  # whoever prints next notices, and can save
                print(line, flush=True)

    def reach(self, done: int, note: str = "") -> None:
        """Moves to `done` steps, which may be fewer than before: some may have to be repeated."""
        self.step(done - self._done, note)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class RolloutProgress:
    """A bar over trajectories, which several calls move on one after another."""

    def __init__(self, bar: Progress, groups: int) -> None:
        self._bar, self._groups = bar, groups
        self._began = time.monotonic()
        self._before, self._now = Tally(), Tally()

    def begin(self) -> None:
        """Another call follows: its tally starts from zero."""
        self._before, self._now = self._before + self._now, Tally()

    def show(self, tally: Tally) -> None:
        """How far the call is."""
        self._now = Tally() + tally
        total = self._before + tally
        speed = total.tokens / max(time.monotonic() - self._began, 1e-9)
        note = f"{total.groups}/{self._groups} groups, {speed:.0f} tok/s"
        self._bar.reach(total.trajectories, note)
