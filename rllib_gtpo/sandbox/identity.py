"""A user of its own for each scratch directory, where the zygote is root; capabilities dropped."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from collections.abc import Iterable

USERS = 4096  # how many of them one zygote uses
_FIRST, _LAST = 0x70000000, 0x7FFFFFFF  # users that no system and no container tool hands out
_READ_SEARCH = 1 << 2  # CAP_DAC_READ_SEARCH
_KEEP_CAPABILITIES, _SET_DEATH_SIGNAL = 8, 1
_libc = ctypes.CDLL(None, use_errno=True)


def first_user() -> int:
    """The first of `USERS` user ids that are nobody's; 0 if this process cannot switch to them."""
    if os.getuid() != 0:
        return 0
    try:
        with open("/proc/self/uid_map") as f:
            inside, _, count = max((list(map(int, line.split())) for line in f), key=lambda r: r[2])
    except (OSError, ValueError):
        return 0
    if inside + count > _LAST:
        blocks = (_LAST - _FIRST + 1) // USERS
        first = _FIRST + _random(blocks) * USERS
    elif count >= 8 * USERS:  # a user namespace: stay clear of the low ids and of `nobody`
        first = inside + count - (2 + _random(4)) * USERS
    else:
        return 0
    return first if _works(first) else 0


def _random(count: int) -> int:
    """Below `count`; zygotes that share a machine are unlikely to draw the same."""
    return int.from_bytes(os.urandom(4)) % count


def _works(user: int) -> bool:
    """Whether a child can become `user` and still be killed from here."""
    read, write = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            assume(user, False)
            die_with(parent)
            os.write(write, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    try:
        became = os.read(read, 1)
        os.kill(pid, signal.SIGKILL)
    except PermissionError:  # no CAP_KILL; the closed pipe is of no use to it, so end it otherwise
        became = b""
        os.setresuid(-1, user, 0)
        os.kill(pid, signal.SIGKILL)
        os.setresuid(-1, 0, 0)
    finally:
        os.close(read)
    _, status = os.waitpid(pid, 0)
    return bool(became) and os.WIFSIGNALED(status)


def die_with(parent: int) -> None:
    """End this process with the one that forked it; forgotten when the user changes.

    Raises:
        OSError: That one has ended already.
    """
    _libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        raise OSError("the parent process is gone")


def needs_search(paths: Iterable[str]) -> bool:
    """Whether others cannot get to one of `paths`, such as a Python below a closed /root."""
    for path in paths:
        while path != "/":
            try:
                if not os.stat(path).st_mode & 0o001 and os.path.isdir(path):
                    return True
            except OSError:
                return True
            path = os.path.dirname(path)
    return False


def assume(user: int, search: bool) -> None:
    """Become `user` for good, without capabilities but, with `search`, CAP_DAC_READ_SEARCH.

    Raises:
        OSError: The kernel refuses.
    """
    if search:
        _libc.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    drop_capabilities(_READ_SEARCH if search else 0)


def drop_capabilities(keep: int = 0) -> None:
    """Give up every capability but those in the mask `keep`.

    Raises:
        OSError: The kernel refuses.
    """
    header = struct.pack("<Ii", 0x20080522, 0)
    if _libc.capset(header, struct.pack("<6I", keep, keep, 0, 0, 0, 0)) != 0:
        raise OSError(ctypes.get_errno(), "capset")
