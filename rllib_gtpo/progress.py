"""Progress for people: bars on a terminal, a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_LINE_EVERY_S = 30.0


class Progress:
    """A bar over `total` steps; without a terminal it prints a line every half minute instead."""

    def __init__(self, label: str, total: int, *, start: int = 0, enabled: bool = True) -> None:
        self._label, self._total, self._done = label, total, start
        self._enabled = enabled
        self._note = ""
        self._printed = time.monotonic()
        terminal = enabled and sys.stderr.isatty()
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
            print(f"{self._label}: {self._done}/{self._total} {self._note}".rstrip(), flush=True)

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
