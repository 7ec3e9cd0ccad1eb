"""Finding the processes of an engine, so that tests can kill them."""

from __future__ import annotations

from pathlib import Path


def core_of(pid):
    """The process of an engine's core, given its actor's: the child that vLLM gave a name."""
    own = children(pid)
    for child in own:
        if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    raise AssertionError(f"process {pid} has no engine core among {own}")


def children(pid):
    """The child processes that any thread of a process has started."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]
