"""What an execution may use and what came of it.  Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from rllib_gtpo.errors import ConfigError, GTPOError

RESTARTED = "[The session was restarted: names defined before are gone.]\n"


class SandboxUnavailable(GTPOError, RuntimeError):
    """The host cannot run code (no process, no descriptors, closed); never the code's own fault."""


class Status(StrEnum):
    """How an execution ended."""

    OK = "ok"  # ran to its end, or exited with code 0
    ERROR = (
        "error"  # an exception escaped (traceback in the output), or it exited with another code
    )
    TIMEOUT = "timeout"  # used up its CPU time, or far too much wall time
    MEMORY = "memory"  # a MemoryError escaped
    OUTPUT_LIMIT = "output_limit"  # printed past the hard cap and was killed
    DISK_LIMIT = "disk_limit"  # a file, or all files together, grew past the limit
    KILLED = "killed"  # died of a signal, its own or another's
    PROTOCOL_VIOLATION = "protocol_violation"  # wrote to the descriptor that it must leave alone


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one execution: a fresh run, or one cell of a session.

    The deadline is CPU time, because on a loaded machine wall time would fail code that is right.
    Wall time only ends code that sleeps or waits; time spent waiting for a core does not count.
    """

    cpu_seconds: float = 5.0
    memory_mb: int = 1024  # address space on top of what the preloaded modules occupy
    output_chars: int = 8192  # of the output that is kept: the first half and the last half
    wall_seconds: float | None = None  # None: six times cpu_seconds
    max_output_mb: float = 64.0  # printing more than this is killed
    file_mb: int = 64  # size of any one file
    disk_mb: int = 128  # of all files together; where a tmpfs holds them, this is memory
    disk_files: int = 4096
    threads: int = 128
    open_files: int = 256

    def __post_init__(self) -> None:
        """Refuse limits that nothing could run under."""
        for name in ("cpu_seconds", "memory_mb", "max_output_mb", "file_mb", "disk_mb"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"Limits.{name} must be positive, got {getattr(self, name)!r}.")
        if self.output_chars < 256:
            raise ConfigError(f"Limits.output_chars must be at least 256, got {self.output_chars}.")
        if self.open_files < 16:
            raise ConfigError(f"Limits.open_files must be at least 16, got {self.open_files}.")
        for name in ("disk_files", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"Limits.{name} must be at least 1, got {getattr(self, name)!r}.")
        if self.wall_seconds is not None and self.wall_seconds < self.cpu_seconds:
            raise ConfigError(
                f"Limits.wall_seconds ({self.wall_seconds}) is below cpu_seconds "
                f"({self.cpu_seconds}): leave it None for six times the CPU time."
            )

    @property
    def wall(self) -> float:
        """The wall-clock deadline in seconds."""
        return 6 * self.cpu_seconds if self.wall_seconds is None else self.wall_seconds


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """What an execution gave back.

    `output` is what a model should see: stdout and stderr in the order they were written, plus a
    line in brackets where the process was ended or a session had to start again.  It is never
    longer than `Limits.output_chars`.
    """

    status: Status
    output: str
    cpu_seconds: float
    wall_seconds: float
