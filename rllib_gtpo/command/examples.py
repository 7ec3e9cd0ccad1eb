"""The tuned examples: in the working directory, in the checkout, or in the installed package."""

from __future__ import annotations

import ast
import os
import shlex
from importlib import metadata
from pathlib import Path

from rllib_gtpo.errors import ConfigError, did_you_mean

FOLDER = "tuned_examples"


def find_examples() -> list[Path]:
    """The example files, from the first place that has any."""
    checkout = Path(__file__).resolve().parents[2]
    for folder in (Path(FOLDER), checkout / FOLDER, *_installed()):
        found = [
            path
            for path in sorted(folder.glob("*"))
            if path.suffix in (".py", ".yaml", ".yml") and not path.name.startswith("_")
        ]
        if found:
            return found
    raise ConfigError(
        "no tuned examples: neither here nor among the files of rllib-gtpo; install it again"
    )


def _installed() -> list[Path]:
    """Where a wheel puts them, which depends on the scheme of the installation."""
    try:
        files = metadata.files("rllib-gtpo") or []
    except metadata.PackageNotFoundError:
        files = []
    return [
        Path(str(file.locate())).resolve().parent for file in files if file.match(f"{FOLDER}/*")
    ][:1]


def find_example(name: str) -> Path:
    """The example of that name, with or without its ending (of two: the Python file)."""
    found = find_examples()
    for path in found:  # .py comes before .yaml
        if name in (path.name, path.stem, str(path)):
            return path
    raise ConfigError(f"there is no example {name!r}{did_you_mean(name, [p.name for p in found])}")


def describe(path: Path) -> str:
    """The first line of a Python file's docstring, or of a YAML file's comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        try:
            lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        except SyntaxError:
            lines = []
        return lines[0] if lines else ""
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    return first.lstrip("# ") if first.startswith("#") else ""


def list_examples() -> None:
    """Prints each example's path, ready for `rllib train file`, and what it is."""
    found = find_examples()
    shown = [(os.path.relpath(p) if p.is_relative_to(Path.cwd()) else str(p), p) for p in found]
    width = max(len(name) for name, _ in shown)
    for name, path in shown:
        print(f"{name:<{width}}  {describe(path)}".rstrip())


def get_example(name: str, target: Path) -> None:
    """Copies an example, to be changed, and prints how to train it."""
    source = find_example(name)
    if target.is_dir():
        target = target / source.name
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise ConfigError(f"{target} exists: remove it, or name another file.") from None
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error}") from error
    print(target)
    print(shlex.join(["rllib", "train", "file", str(target)]))
