"""Links that leave docs/ also work in the site, which does not know where the repository is.

Pages link to files of the repository (`../release/results/speed.json`) by relative paths, so that
they work where a forge shows them.  Here such a file becomes a part of the site, under
`repository/`: Markdown as a page, anything else as it is.  A link to what does not exist ends the
build.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # of the repository, in the navigation
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)#\s]+)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds what pages link to, and what it links to in turn."""
    waiting = [Path(f.abs_src_path) for f in files.documentation_pages() if f.abs_src_path]
    waiting += [ROOT / name for name in PAGES]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        if files.get_file_from_path(_place(path)) is None:
            files.append(File.generated(config, _place(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            found = {_target(path, link) for link in _LINK.findall(path.read_text("utf-8"))} - seen
            outside = {target for target in found if not target.is_relative_to(ROOT / "docs")}
            seen |= outside
            waiting += sorted(outside)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between places of the site."""
    here = Path(page.file.abs_src_path)
    folder = posixpath.dirname(page.file.src_uri)
    return _LINK.sub(
        lambda link: posixpath.relpath(_place(_target(here, link[0])), folder or "."), markdown
    )


def _target(page: Path, link: str) -> Path:
    path = Path(posixpath.normpath((page.parent / link).as_posix()))
    if not path.is_file():
        raise PluginError(f"{page.relative_to(ROOT)} links to {link}, which does not exist")
    return path


def _place(path: Path) -> str:
    """Where a file of the repository is in the site's sources."""
    if path == ROOT / "README.md":
        return "index.md"
    docs = ROOT / "docs"
    if path.is_relative_to(docs):
        return path.relative_to(docs).as_posix()
    return f"repository/{path.relative_to(ROOT).as_posix()}"
