"""Which files a confined process may reach, by Landlock; runs in the zygote and its children.

A ruleset names the roots that may be read and one directory that may be written.  It is made once
for each scratch directory; a process that restricts itself by it gets a domain of its own.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_PRCTL_NO_NEW_PRIVS = 38
_WRITE_FILE, _READ_FILE, _READ_DIR, _TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 14
_REMOVE = 1 << 4 | 1 << 5  # directories, files
_MAKE = 1 << 7 | 1 << 8 | 1 << 12  # directories, regular files, symbolic links
_REFER = 1 << 13  # rename and link between directories
READ = _READ_FILE | _READ_DIR
WRITE = READ | _WRITE_FILE | _REMOVE | _MAKE | _REFER | _TRUNCATE
FILE_READ, FILE_WRITE = _READ_FILE, _READ_FILE | _WRITE_FILE | _TRUNCATE
_libc = ctypes.CDLL(None, use_errno=True)


def version() -> int:
    """The kernel's Landlock ABI; 0 without Landlock."""
    return max(int(_libc.syscall(_CREATE, None, 0, 1)), 0)


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), what)
    return result


class Rules:
    """Makes rulesets that differ in the writable directory alone."""

    def __init__(self, access: Iterable[tuple[str, int]]) -> None:
        """Open what may be reached: pairs of a path and READ, FILE_READ or FILE_WRITE."""
        self.abi = version()
        bits = {1: 13, 2: 14, 3: 15, 4: 15}.get(self.abi, 16)
        self._files = (1 << bits) - 1  # everything that this kernel can refuse is refused
        network = 3 if self.abi >= 4 else 0  # TCP bind and connect
        scopes = 3 if self.abi >= 6 else 0  # abstract unix sockets, signals
        size = 24 if self.abi >= 6 else 16 if self.abi >= 4 else 8
        self._attributes = struct.pack("<QQQ", self._files, network, scopes)[:size]
        self._access = [(os.open(path, os.O_PATH | os.O_CLOEXEC), a) for path, a in access]

    def ruleset(self, scratch: str) -> int:
        """A descriptor of the rules for a process whose own directory is `scratch`."""
        ruleset = _check(
            _libc.syscall(_CREATE, self._attributes, len(self._attributes), 0), "rules"
        )
        own = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            for fd, access in [*self._access, (own, WRITE)]:
                rule = struct.pack("<Qi", access & self._files, fd)
                _check(_libc.syscall(_ADD, ruleset, 1, rule, 0), "Landlock rule")
        except OSError:
            os.close(ruleset)
            raise
        finally:
            os.close(own)
        return ruleset


def restrict(ruleset: int) -> None:
    """Put this process under the rules for good.

    Raises:
        OSError: The kernel refuses.
    """
    _check(_libc.prctl(_PRCTL_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _check(_libc.syscall(_RESTRICT, ruleset, 0), "Landlock")
