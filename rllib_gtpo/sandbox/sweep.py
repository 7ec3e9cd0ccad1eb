"""Removing what hostile code left on disk.  Standard library only; also used in the zygote."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator


def sweep(top: str) -> None:
    """Remove the directory `top`, however deep, wide or unreadable; follows no symbolic link.

    Subdirectories are moved up beside each other before they are emptied, so that neither the
    recursion limit nor the longest path name matters.
    """
    shelf = top + ".sweep"
    with contextlib.suppress(OSError):
        os.mkdir(shelf, 0o700)
    try:
        shelf_fd = os.open(shelf, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    # The shelf is not empty if whoever swept before was killed.
    queue = [top, *(os.path.join(shelf, name) for name in os.listdir(shelf_fd))]
    count = 0
    while queue:
        directory = queue.pop()
        for name, fd in _entries(directory):
            try:
                if stat.S_ISDIR(os.lstat(name, dir_fd=fd).st_mode):
                    count += 1
                    place = f"{os.getpid()}-{count}"
                    os.close(_make_writable(name, fd))  # to move it takes that, if not root
                    os.rename(name, place, src_dir_fd=fd, dst_dir_fd=shelf_fd)
                    queue.append(os.path.join(shelf, place))
                else:
                    os.unlink(name, dir_fd=fd)
            except OSError:
                continue
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    os.close(shelf_fd)
    with contextlib.suppress(OSError):
        os.rmdir(shelf)
    with contextlib.suppress(OSError):  # what took the name of a directory, never what it points at
        os.unlink(top)


def _make_writable(directory: str, parent: int | None) -> int:
    """Make sure that the owner can use it; returns a path descriptor of it, never of a link."""
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    with contextlib.suppress(OSError):
        os.chmod(f"/proc/self/fd/{fd}", 0o700)
    return fd


def _entries(directory: str) -> Iterator[tuple[str, int]]:
    """The names in `directory` with a descriptor of it; none if it is a symbolic link."""
    try:
        path_fd = _make_writable(directory, None)
    except OSError:
        return
    fd = -1
    try:
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=path_fd)
        for name in os.listdir(fd):
            yield name, fd
    except OSError:
        return
    finally:
        os.close(path_fd)
        if fd >= 0:
            os.close(fd)
