"""What a confined interpreter needs to read: its library, installed packages, shared libraries."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

DEVICES = ("/dev/null", "/dev/urandom")
DATA = ("/usr/share/zoneinfo",)  # of the standard library, kept elsewhere
_COMPILED = (  # what extension modules of packages link to
    *("libstdc++.so.6", "libgcc_s.so.1", "libgomp.so.1", "libgfortran.so.5", "libz.so.1"),
    *("libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1"),
)


def directories(packages: list[str]) -> list[str]:
    """The standard library and the given directories of packages; call before `sys.path` grows."""
    paths = [os.path.abspath(path) for path in [*sys.path, *packages, *DATA] if path]
    return list(dict.fromkeys(path for path in paths if os.path.exists(path)))


def libraries(inside: list[str]) -> list[str]:
    """Shared libraries outside the directories `inside` that extension modules load.

    Found by loading the standard library's extensions in a throw-away child: Landlock can then
    grant these files instead of the directories that hold them.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            with open(write, "w") as f:
                f.write("\n".join(_loaded(inside)))
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write)
    with open(read) as f:
        found = f.read().split("\n")
    os.waitpid(pid, 0)
    cache = ["/etc/ld.so.cache"]
    return [path for path in found + cache if path and os.path.isfile(path)]


def _loaded(inside: list[str]) -> list[str]:
    names = list(_COMPILED)
    for directory in inside:
        if os.path.basename(directory) == "lib-dynload":
            names += [e.path for e in os.scandir(directory) if e.name.endswith(".so")]
    for name in names:
        with contextlib.suppress(OSError):
            ctypes.CDLL(name, os.RTLD_LAZY)
    with open("/proc/self/maps") as f:
        lines = [line.split(maxsplit=5) for line in f]
    paths = {line[5].strip() for line in lines if len(line) == 6 and ".so" in line[5]}
    tops = tuple(os.path.realpath(path) + "/" for path in inside)
    return sorted(path for path in paths if not os.path.realpath(path).startswith(tops))
