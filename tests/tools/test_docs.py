"""What docs/tools.md shows works as written."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from rllib_gtpo.tools import MCPServer, Tool
from rllib_gtpo.types import ToolError

PAGE = (Path(__file__).parents[2] / "docs" / "tools.md").read_text()


def test_the_page_of_the_tools_works(monkeypatch):
    pytest.importorskip("mcp")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/tools.md, block {number}", "exec"), names)
    assert len(blocks) == 5
    searched, noted, fetched = names["results"]
    assert searched.content == "Employees have 30 days of leave."
    assert noted.content == "1 notes" and names["env"].notes == ["30 days"]
    assert (fetched.error, fetched.content) == (ToolError.TIMEOUT, "Error: timed out after 0.2 s")
    assert names["converted"].error is None
    assert json.loads(names["converted"].content)["target"]["datetime"].endswith("07:30:00+00:00")
    assert isinstance(names["Desk"].tools[0], MCPServer)


def test_the_texts_of_the_page_are_those_of_the_tools():
    def search(query: str) -> str:
        """Search."""
        return {}[query]

    problem = Tool.from_function(search).check({"query": 3})
    assert f"`Error: {problem}`" in PAGE
