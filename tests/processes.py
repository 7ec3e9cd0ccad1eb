"""Which processes run, for tests that none is left."""

from __future__ import annotations

import time
from pathlib import Path


def running(word: str, parent: int | None = None) -> set[int]:
    """The processes with `word` in their command, of any or one parent; zombies do not count."""
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state, above = (directory / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has just ended
        if word in command and state != "Z" and parent in (None, int(above)):
            found.add(int(directory.name))
    return found


def gone(pid: int, seconds: float = 15.0) -> bool:
    """Whether the process ends soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):  # before or after it was opened
            return True
        if state == "Z":  # nobody has waited for it yet
            return True
        time.sleep(0.05)
    return False
