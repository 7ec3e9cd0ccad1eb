"""Namespaces of the zygote's own: no network, no IPC of others, and a root with little in it.

All its children share them, so they cost nothing per execution.  The private root holds read-only
binds of what may be read; a scratch directory is a tmpfs of bounded size and number of files.
Without privileges they come with a user namespace, where the system allows one.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

_NEW_USER, _NEW_OTHERS = 0x10000000, 0x00020000 | 0x04000000 | 0x08000000 | 0x40000000
_READ_ONLY, _NO_SUID, _NO_DEV, _NO_EXEC, _REMOUNT, _BIND = 1, 2, 4, 8, 32, 4096
_RECURSIVE, _PRIVATE, _DETACH = 16384, 1 << 18, 2
_RELATIVE_TIMES = 1 << 21
_PIVOT_ROOT = 155
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), what)


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), flags, options.encode())
    _check(_libc.mount(*arguments), f"mount {target}")


def enter(alone: bool) -> None:
    """Move this single-threaded process into new namespaces.

    With `alone`, a user namespace that knows only the present user may come with them.

    Raises:
        OSError: They are not allowed here.
    """
    user, group = os.getuid(), os.getgid()
    if _libc.unshare(_NEW_OTHERS) != 0:
        if not alone:
            raise OSError(ctypes.get_errno(), "unshare")
        _check(_libc.unshare(_NEW_USER | _NEW_OTHERS), "unshare")
        maps = [
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ]
        for name, text in maps:
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    _mount("none", "/", "", _RECURSIVE | _PRIVATE)


def available(scratch: str, alone: bool) -> bool:
    """Whether `enter`, a tmpfs and a private root work; found out in a throw-away child."""
    pid = os.fork()
    if pid == 0:
        try:
            enter(alone)
            enter_root([os.path.dirname(os.__file__)], [], scratch)
            place = os.path.join(scratch, "probe")
            os.mkdir(place)
            mount_scratch(place, os.getuid(), 1 << 20, 16)
            with open(os.path.join(place, "file"), "w") as f:
                f.write("x")
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def mount_scratch(path: str, user: int, size: int, files: int) -> None:
    """Make the directory `path` an empty file system of `size` bytes, owned by `user`."""
    options = f"mode=0700,uid={user},gid={user},size={size},nr_inodes={files + 1}"
    if user == os.getuid():
        options = f"mode=0700,size={size},nr_inodes={files + 1}"
    _mount("tmpfs", path, "tmpfs", _NO_SUID | _NO_DEV | _NO_EXEC, options)


def unmount_scratch(path: str) -> None:
    """Drop the file system at `path` with all that it holds, and the directory."""
    _check(_libc.umount2(path.encode(), _DETACH), f"umount {path}")
    os.rmdir(path)


def enter_root(directories: Iterable[str], files: Iterable[str], scratch: str) -> None:
    """Make a root that holds these directories and files, read-only, and an empty `scratch`.

    The directory `scratch` must exist; the new root is mounted over it for a moment.

    Raises:
        OSError: The kernel refuses.
    """
    links = [(e.path, os.readlink(e.path)) for e in os.scandir("/") if e.is_symlink()]
    _mount("tmpfs", scratch, "tmpfs", _NO_SUID | _NO_DEV, "mode=0755,size=1m")
    for path, target in links:  # /lib -> usr/lib
        os.symlink(target.lstrip("/"), scratch + path)
    for path in directories:
        os.makedirs(scratch + path, 0o755, exist_ok=True)
        _bind(path, scratch + path)
    real = {os.path.realpath(path) for path in files}
    for path in real:
        os.makedirs(scratch + os.path.dirname(path), 0o755, exist_ok=True)
        os.close(os.open(scratch + path, os.O_WRONLY | os.O_CREAT, 0o644))
        _bind(path, scratch + path)
    for directory in {os.path.dirname(path) for path in real}:
        _link_aliases(directory, real, scratch)
    os.makedirs(scratch + scratch, 0o755, exist_ok=True)
    os.chdir(scratch)
    _check(_libc.syscall(_PIVOT_ROOT, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount of the old root")
    os.chdir("/")


def _bind(source: str, target: str) -> None:
    """Show `source` at `target`, read-only unless it is a device."""
    _mount(source, target, "", _BIND | _RECURSIVE)
    if source.startswith("/dev/"):
        return
    now = os.statvfs(target).f_flag  # what an owner of fewer rights must leave as it is
    keep = now & (_NO_DEV | _NO_EXEC | os.ST_NOATIME | os.ST_NODIRATIME)
    keep |= _RELATIVE_TIMES if now & os.ST_RELATIME else 0
    _mount("none", target, "", _BIND | _REMOUNT | _READ_ONLY | _NO_SUID | keep)


def _link_aliases(directory: str, real: set[str], top: str) -> None:
    """Under `top`, make the links of `directory` to files in `real`: libz.so.1 -> libz.so.1.3."""
    for entry in os.scandir(directory):
        if ".so" in entry.name and entry.is_symlink():
            target = os.path.realpath(entry.path)
            if target in real:
                os.symlink(target, top + entry.path)
