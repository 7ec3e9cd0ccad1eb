"""The names of what a sandbox can enforce.  A backend reports each as enforced or not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

MEANINGS: Mapping[str, str] = MappingProxyType(
    {
        "separate process": "one per execution or session, forked from a clean interpreter",
        "clean environment": "none of the host's environment, arguments or descriptors",
        "no shared state": "an execution inherits no code, output or memory of another",
        "cpu limit": "ended by CPU time",
        "wall limit": "ended where it only sleeps or waits",
        "memory limit": "address space of the one process that an execution is",
        "output limit": "what is kept is bounded, and what may be printed",
        "file size limit": "size of any one file",
        "disk limit": "bytes and files of an execution together",
        "killed with the host": "nothing outlives the host or its zygote",
        "process creation": "no fork, no exec: one process per execution",
        "file reads": "only the standard library, installed packages and its own directory",
        "file writes": "only its own directory",
        "file metadata": "no chmod, chown, utime, xattr, truncate outside its own directory",
        "network": "no socket but pairs of its own",
        "signals to other processes": "can signal only itself",
        "other processes' memory": "no ptrace, no process_vm, no /proc, no pidfd",
        "ipc objects": "no System V or POSIX IPC object that outlives it",
        "system call filter": "an allowlist; other system calls and foreign ABIs are refused",
        "own user": "a user of its own per execution, without capabilities",
        "own namespaces": "no view of the host's files, mounts, network or IPC",
    }
)
NAMES = frozenset(MEANINGS)


def report(enforced: Iterable[str]) -> Mapping[str, bool]:
    """All names, in their order, with whether each is among `enforced`.

    Raises:
        KeyError: A name that is not in `NAMES`.
    """
    enforced = set(enforced)
    if unknown := enforced - NAMES:
        raise KeyError(f"Unknown guarantees {sorted(unknown)}: add them to MEANINGS.")
    return MappingProxyType({name: name in enforced for name in MEANINGS})
