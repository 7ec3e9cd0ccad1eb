"""What to say of a checkpoint that lacks a file, is damaged, or was written by other versions."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from rllib_gtpo.errors import ConfigError

PACKAGES = ("rllib-gtpo", "ray", "torch", "transformers")
_UNREADABLE = (OSError, EOFError, pickle.UnpicklingError, ImportError, AttributeError, KeyError)


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turns what damage raises into a ConfigError that says how to go on."""
    try:
        yield
    except ConfigError:
        raise
    except _UNREADABLE as error:
        raise ConfigError(f"{checkpoint} {_why(error)}{_advice(checkpoint)}") from error


def installed_versions() -> dict[str, str]:
    """Of the packages that a checkpoint depends on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def other_versions(then: Mapping[str, str]) -> str:
    """How the packages of a run differ from those here: "ray 2.59.0 (here 2.60.0)", or ""."""
    here = installed_versions()
    changed = [name for name in here if name in then and then[name] != here[name]]
    return ", ".join(f"{name} {then[name]} (here {here[name]})" for name in changed)


def _why(error: BaseException) -> str:
    if isinstance(error, ImportError | AttributeError):
        return (
            f"cannot be read: {error}. Run this where the modules that it was trained with (its "
            "environment's, say) can be imported"
        )
    return f"cannot be read: a file of it is missing or damaged ({type(error).__name__}: {error})"


def _advice(checkpoint: Path) -> str:
    """Which versions wrote it, and what else there is to continue from."""
    advice = ""
    try:
        versions = json.loads((checkpoint.parent / "run.json").read_text())["versions"]
        changed = other_versions(versions)
    except (OSError, ValueError, KeyError, TypeError):
        changed = ""
    if changed:
        advice += f". It was written with {changed}"
    others = sorted(
        str(path.parent)
        for path in checkpoint.parent.glob("*checkpoint_*/progress.json")
        if path.parent.name != checkpoint.name
    )
    return advice + (f". There is also {', '.join(others)}" if others else "")
