"""What is wrong on a page is found: the checks of the other tests can fail."""

from __future__ import annotations

import pytest

from tests.docs import pages
from tests.docs.commands import check_command
from tests.docs.pages import blocks, run_python
from tests.docs.test_names import exists

FENCE = "```"


def page_of(tmp_path, monkeypatch, text):
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(text)
    return page


def test_blocks_build_on_each_other_and_print_what_the_page_says(tmp_path, monkeypatch):
    text = f"# A\n{FENCE}python\nx = 1\n{FENCE}\nthen\n{FENCE}python\nprint(x + 1)\n{FENCE}\n\n"
    good = page_of(tmp_path, monkeypatch, text + f"{FENCE}text\n2\n{FENCE}\n")
    assert run_python(good, {})["x"] == 1
    bad = page_of(tmp_path, monkeypatch, text + f"{FENCE}text\n3\n{FENCE}\n")
    with pytest.raises(AssertionError, match=r"page.md:11 prints something else:\n2"):
        run_python(bad, {})


def test_an_error_names_the_line_and_an_excused_block_runs_only_its_imports(tmp_path, monkeypatch):
    block = f"{FENCE}python\nimport math\nawait nothing\n{FENCE}\n"
    excused = page_of(tmp_path, monkeypatch, f"<!-- not run: no GPU -->\n{block}")
    assert blocks(excused)[0].not_run == "no GPU"
    assert "math" in run_python(excused, {})
    with pytest.raises(SyntaxError, match="outside function"):
        run_python(page_of(tmp_path, monkeypatch, block), {})
    with pytest.raises(ModuleNotFoundError):
        missing = f"<!-- not run: no GPU -->\n{FENCE}python\nimport rllib_gtpo.nothing\n{FENCE}\n"
        run_python(page_of(tmp_path, monkeypatch, missing), {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rllib train file X --overide lr=1", "is not understood"),
        ("rllib train file tuned_examples/gtpo.py", "there is no tuned_examples/gtpo.py"),
        ("make quickstrat", "make has no quickstrat"),
        ("python release/quickstart.py --everything", "no option --everything"),
        ("python -m rllib_gtpo.nothing", "no module"),
        ("pip install 'rllib-gtpo[gpu]'", "no extra 'gpu'"),
        ("curl http://localhost", "nobody checks 'curl'"),
    ],
)
def test_a_command_that_would_not_run_is_found(line, message):
    with pytest.raises(AssertionError, match=message):
        check_command(line, "page.md:1")


def test_overrides_of_an_experiment_are_tried():
    from rllib_gtpo.errors import ConfigError

    line = "rllib train file tuned_examples/gtpo_calculator.py --override "
    check_command(f"{line}lr=1e-4  # slower", "page.md:1")
    with pytest.raises(ConfigError, match="group_size"):
        check_command(f"{line}groupsize=4", "page.md:1")


def test_a_metric_that_does_not_exist_is_found():
    assert exists("group/kept") and exists("stop/*") and exists("evaluation/accuracy")
    assert not exists("group/keep") and not exists("evaluation/accurate") and not exists("no/*")
