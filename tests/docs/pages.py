"""The fenced blocks of README, CONTRIBUTING and docs/, and what is said about running them.

Every fence has a language.  `python` is executed, block after block in one namespace of the page;
a `text` block right behind it is what it prints.  `bash` is checked line by line, `yaml` is loaded.
A comment in front of a fence says otherwise, with the reason:

    <!-- not run: needs a GPU -->     the block is parsed, and only its imports are executed
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`\n]*)$")
_NOT_RUN = re.compile(r"<!-- not run: (?P<why>.+) -->")


@dataclass(frozen=True)
class Block:
    """One fence.  `line` is that of its text; `follows` whether only blank lines are between it and
    the block before."""

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None
    follows: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def compiled(self) -> Any:
        """The code that is run, with the page and line in its tracebacks."""
        flags = 0 if self.not_run is None else ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        tree = compile(self.text, str(self.page), "exec", ast.PyCF_ONLY_AST | flags)
        if self.not_run is not None:
            tree.body = [
                node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
            ]
        ast.increment_lineno(tree, self.line - 1)
        return compile(tree, str(self.page), "exec")


def blocks(page: Path) -> list[Block]:
    """All fences of a page in order."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    number, prose = 0, ["start"]  # what stands between the last fence and the next
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        number += 1
        if opened is None:
            prose.append(lines[number - 1])
            continue
        start, closing = number, opened["indent"] + opened["ticks"]
        while lines[number].rstrip() != closing:
            number += 1
        indent = len(opened["indent"])
        text = "".join(line[indent:] + "\n" for line in lines[start:number])
        number += 1
        said = [line for line in prose if line.strip()]
        reason = _NOT_RUN.fullmatch(said[-1].strip()) if said else None
        why = reason["why"] if reason else None
        found.append(Block(page, start + 1, opened["info"].strip(), text, why, not said))
        prose = []
    return found


def run_python(page: Path, names: dict[str, Any]) -> dict[str, Any]:
    """Executes the Python of a page in `names`; compares what it prints with what the page says."""
    printed: str | None = None
    for block in blocks(page):
        if block.language == "text" and block.follows and printed is not None:
            assert printed == block.text, f"{block} prints something else:\n{printed}"
        printed = None
        if block.language != "python":
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(block.compiled(), names)
        printed = output.getvalue()
    return names
