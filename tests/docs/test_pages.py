"""What README and docs/ show works as written."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import sys

import pytest
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig

from rllib_gtpo import GTPOConfig
from rllib_gtpo.chat.formats.base import _FORMATS
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.ops.advantages import ESTIMATORS
from rllib_gtpo.tools import MCPServer, Tool
from rllib_gtpo.types import ToolError
from rllib_gtpo_envs import Calculator
from tests.docs.commands import check_command
from tests.docs.pages import PAGES, ROOT, blocks, run_python
from tests.evaluations.samples import write_results
from tests.record.samples import write_record

LANGUAGES = {"python", "bash", "yaml", "text", "json"}
WITH_PYTHON = [p for p in PAGES if any(b.language == "python" for b in blocks(p))]


def named(page):
    return str(page.relative_to(ROOT))


@contextlib.contextmanager
def kept(registry):
    """What a page registers stays with it."""
    before = dict(registry)
    yield
    registry.clear()
    registry.update(before)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Where pages are run: there is a run, which was evaluated."""
    where = tmp_path_factory.mktemp("pages")
    write_record(where / "runs" / "calculator", iterations=2)
    write_results(where / "runs" / "calculator")
    return where


@pytest.fixture(scope="module")
def names_of(directory):
    """Runs the Python of a page once; `config` is a `GTPOConfig()`."""
    found = {}

    def run(page):
        if page not in found:
            with pytest.MonkeyPatch.context() as patch, kept(ESTIMATORS), kept(_FORMATS):
                patch.chdir(directory)
                patch.setenv("PATH", os.path.dirname(sys.executable), prepend=os.pathsep)
                found[page] = run_python(page, {"__name__": "page", "config": GTPOConfig()})
        return found[page]

    return run


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_the_python_of_a_page_runs(page, names_of):
    if page.name == "tools.md":
        pytest.importorskip("mcp")
    names_of(page)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_other_block_of_a_page_is_checked(page, directory, monkeypatch):
    monkeypatch.chdir(directory)
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block}: a fence is one of {sorted(LANGUAGES)}"
        if block.language == "bash":
            for line in block.text.replace("\\\n", " ").splitlines():
                check_command(line, str(block), excused=block.not_run is not None)
        if block.language == "yaml":
            check_yaml(block)
        if block.language == "json":
            json.loads(block.text)


def check_yaml(block):
    """An experiment is loaded as the command does; anything else must be settings."""
    from rllib_gtpo.command.settings import apply_settings
    from rllib_gtpo.command.yaml_text import parse_yaml

    tree, _ = parse_yaml(block.text, str(block))
    for experiment in tree.values():
        if isinstance(experiment, dict) and "run" in experiment:
            tree = experiment.get("config", {})
    apply_settings(GTPOConfig(), tree)


def test_the_task_of_the_readme_works(names_of):
    names = names_of(ROOT / "README.md")
    env, config = names["env"], names["config"]
    assert env.trajectory.turns[0].results[0].content == "Employees have 30 days of leave."
    *_, terminated, _, _ = env.step("30")
    assert terminated and env.trajectory.correct
    config.validate()
    assert names["stop"]


def test_the_page_of_the_tools_shows_what_tools_do(names_of):
    pytest.importorskip("mcp")
    page = ROOT / "docs" / "tools.md"
    names = names_of(page)
    searched, noted, fetched = names["results"]
    assert searched.content == "Employees have 30 days of leave."
    assert noted.content == "1 notes" and names["env"].notes == ["30 days"]
    assert (fetched.error, fetched.content) == (ToolError.TIMEOUT, "Error: timed out after 0.2 s")
    assert names["converted"].error is None
    assert json.loads(names["converted"].content)["target"]["datetime"].endswith("07:30:00+00:00")
    assert isinstance(names["Desk"].tools[0], MCPServer)

    def search(query: str) -> str:
        """Search."""
        return {}[query]

    problem = Tool.from_function(search).check({"query": 3})
    assert f"`Error: {problem}`" in page.read_text()


def test_the_table_of_settings_has_all_of_them_with_their_defaults():
    table = (ROOT / "docs" / "settings.md").read_text()
    config = GTPOConfig()
    shown = set()
    for call, settings in re.findall(r"^\| (`\.\w+\(\)`.*?) \| (.*) \|$", table, re.M):
        for name, default in re.findall(r"`(\w+)=([^`]+)`", settings):
            name = f"evaluation_{name}" if "evaluation" in call else config.attribute_name(name)
            assert getattr(config, name) == ast.literal_eval(default), name
            shown.add(name)
    own = {name for name in set(vars(config)) - set(vars(AlgorithmConfig())) if name[0] != "_"}
    assert own - shown == {"language_model_source"}  # which is `model`


def test_settings_that_pages_show_are_accepted():
    """Blocks that only set something, each on a config of its own."""
    shown = [b for p in WITH_PYTHON for b in blocks(p) if b.text.startswith("config.")]
    assert len(shown) > 8
    for block in shown:
        if block.not_run is None:
            config = GTPOConfig().environment(Calculator)
            exec(block.compiled(), {"config": config})
            try:
                config.validate()
            except ConfigError as refused:
                assert "needs vLLM, which is not installed" in str(refused), block


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_that_a_page_names_exists(page):
    named_files = r"(?<![\w/.-])(?:tuned_examples|release|tests|envs|rllib_gtpo)/[\w/.]+\w"
    for name in re.findall(named_files, page.read_text()):
        assert (ROOT / name).exists(), name
