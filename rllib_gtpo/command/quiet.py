"""Silences the messages of Ray and RLlib that a user of the `rllib` command cannot act on.

Each entry names one message and says why it goes; everything else stays visible.  `--debug` keeps
all of them.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_DEPRECATION = "ray._common.deprecation"

_LOG_MESSAGES: tuple[tuple[str, str, str], ...] = (
    # (logger, start of the message, why)
    (
        "ray._private.authentication.authentication_token_setup",
        "Token authentication is enabled",
        "Ray's own default; it asks for nothing",
    ),
    (
        "ray.rllib.algorithms.algorithm_config",
        "You are running",
        "the new API stack is the only one that most algorithms still support",
    ),
    (
        _DEPRECATION,
        "DeprecationWarning: `RLModule(config=[RLModuleConfig object])`",
        "RLlib calls its own deprecated constructor",
    ),
    (
        "ray.rllib.core.rl_module.rl_module",
        "DeprecationWarning: `RLModule(config=[RLModuleConfig object])`",
        "the same message, logged by the calling module",
    ),
    (
        "ray.tune.utils.util",
        "Install gputil",
        "RLlib starts the monitor by itself; the package is unmaintained",
    ),
    (
        "ray.train._internal.storage",
        "Checkpoint successfully created at",
        "a line for every checkpoint of every trial",
    ),
    (
        "ray.tune.trainable.trainable",
        "Restored on",
        "a line for every trial of a sweep that goes on",
    ),
    (
        "ray.tune.analysis.experiment_analysis",
        "Failed to fetch metrics for",
        "trials that have not begun have none",
    ),
)

_WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    # (regular expression at the start of the message, category, why)
    (
        r"Tip: In future versions of Ray",
        FutureWarning,
        "about an environment variable that Ray sets for its own workers",
    ),
    (
        r".*WARN: Overriding environment rllib-",
        UserWarning,
        "RLlib registers its own wrapper again for each runner, also for evaluation",
    ),
)


class _Drop(logging.Filter):
    """Drops records whose message starts with `start`."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.start)


def silence() -> None:
    """Installs the filters in this process; also set-up hook of Ray's workers.  Idempotent."""
    for name, start, _ in _LOG_MESSAGES:
        logger = logging.getLogger(name)
        if not any(isinstance(f, _Drop) and f.start == start for f in logger.filters):
            logger.addFilter(_Drop(start))
    for pattern, category, _ in _WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, category=category)


@contextmanager
def registering() -> Iterator[None]:
    """Around Tune's look-up of a name, which imports DreamerV3, which plays CartPole on import."""
    with warnings.catch_warnings():
        for start in ("The obs returned by", "Box (low|high)'s precision lowered"):
            warnings.filterwarnings("ignore", rf".*WARN: {start}", module="gymnasium")
        yield


_NATIVE_NOISE = (
    # RLlib passes its config to runners through the object store and keeps the reference.
    b"has constructor arguments in the object store and max_restarts > 0",
)


@contextmanager
def building() -> Iterator[None]:
    """Around `build_algo`: drops lines that Ray's C++ core writes to standard error directly.

    All other lines pass at once.  A process that is started meanwhile may keep the pipe; the
    thread serves it until it ends.
    """
    sys.stderr.flush()
    original = os.dup(2)
    read, write = os.pipe()
    os.dup2(write, 2)
    os.close(write)

    def forward() -> None:
        with os.fdopen(read, "rb") as lines, os.fdopen(original, "wb", 0) as out:
            for line in lines:
                if not any(noise in line for noise in _NATIVE_NOISE):
                    out.write(line)

    restore = os.dup(original)
    thread = threading.Thread(target=forward, name="stderr-filter", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(restore, 2)
        os.close(restore)
        thread.join(timeout=0.5)  # the pipe has ended unless a child process still holds it
