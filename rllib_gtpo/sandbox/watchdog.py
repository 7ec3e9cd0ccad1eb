"""Watches what no kernel limit bounds here: disk use without a tmpfs, threads without own users.

A small process beside the zygote, forked before the preload.  It only reports; the zygote kills.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
import time

REPORT = struct.Struct("<cQ")  # "D"isk and a slot's number, or "T"hreads and a process id
PERIOD = 0.05
DEEPEST = 64  # directories below each other; deeper counts as too many files
_THRESHOLD, _ROUNDS = 4 << 20, 10  # look if the file system changed by this, or every so often


def watch(
    scratch: str, zygote: int, report: int, disk: tuple[int, int] | None, threads: int
) -> None:
    """Report until the zygote is gone.

    Args:
        scratch: The directory whose numbered subdirectories are watched.
        zygote: The process whose children are watched.
        report: Where to write.
        disk: Bytes and files that each may have; None: somebody else bounds them.
        threads: How many each child may have; 0: somebody else bounds them.
    """
    before, rounds = (0, 0), 0
    while os.getppid() == zygote:
        if disk is not None:
            used = os.statvfs(scratch)
            now = (used.f_bfree * used.f_bsize, used.f_ffree)
            rounds += 1
            if rounds % _ROUNDS == 0 or before[0] - now[0] > _THRESHOLD or before[1] - now[1] > 256:
                before = now
                for name in os.listdir(scratch):
                    if name.isdigit() and exceeds(os.path.join(scratch, name), *disk):
                        os.write(report, REPORT.pack(b"D", int(name)))
        if threads:
            for pid in _children(zygote):
                with contextlib.suppress(OSError):
                    if os.stat(f"/proc/{pid}/task").st_nlink - 2 > threads:
                        os.write(report, REPORT.pack(b"T", pid))
        time.sleep(PERIOD)


def _children(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as f:
            return [int(word) for word in f.read().split()]
    except OSError:
        return []


def exceeds(top: str, size: int, files: int) -> bool:
    """Whether the tree below `top` holds more, or cannot be measured; follows no symbolic link."""
    open_directories: list[int] = []
    try:
        open_directories.append(os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW))
    except OSError:
        return False  # it is gone
    iterators = [os.scandir(open_directories[0])]
    try:
        while iterators:
            entry = next(iterators[-1], None)
            if entry is None:
                iterators.pop().close()
                os.close(open_directories.pop())
                continue
            files -= 1
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            size -= status.st_blocks * 512
            if size < 0 or files < 0 or len(iterators) > DEEPEST:
                return True
            if stat.S_ISDIR(status.st_mode):
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                with contextlib.suppress(FileNotFoundError):
                    fd = os.open(entry.name, flags, dir_fd=open_directories[-1])
                    open_directories.append(fd)
                    iterators.append(os.scandir(fd))
    except OSError:
        return True  # a directory made unreadable
    finally:
        for iterator in iterators:
            iterator.close()
        for fd in open_directories:
            os.close(fd)
    return False
