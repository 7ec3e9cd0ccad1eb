"""Finds the tuned examples: in the working directory or in the checkout."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path


def find_examples() -> list[Path]:
    """The example files, from the first place that has any."""
    checkout = Path(__file__).resolve().parents[2]
    for folder in (Path("tuned_examples"), checkout / "tuned_examples"):
        found = [
            path
            for path in sorted(folder.glob("*"))
            if path.suffix in (".py", ".yaml", ".yml") and not path.name.startswith("_")
        ]
        if found:
            return found
    return []


def describe(path: Path) -> str:
    """The first line of a Python file's docstring, or of a YAML file's comment."""
    text = path.read_text()
    if path.suffix == ".py":
        try:
            lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        except SyntaxError:
            lines = []
        return lines[0] if lines else ""
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    return first.lstrip("# ") if first.startswith("#") else ""


def list_examples() -> int:
    """Prints each example's path, ready for `rllib train file`, and what it is."""
    found = find_examples()
    if not found:
        print("no tuned examples here: run this in a checkout of rllib_gtpo", file=sys.stderr)
        return 1
    shown = [(os.path.relpath(p) if p.is_relative_to(Path.cwd()) else str(p), p) for p in found]
    width = max(len(name) for name, _ in shown)
    for name, path in shown:
        print(f"{name:<{width}}  {describe(path)}".rstrip())
    return 0
