"""The site is built without a warning, asks nobody for anything, and its pictures are current."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.docs.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_no_page_asks_for_anything_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        fetched = re.findall(r'<(?:script|img|iframe|source)[^>]* src="([^"]+)"', text)
        fetched += re.findall(r'<link[^>]* rel="(?:stylesheet|icon|preconnect)"[^>]*>', text)
        assert fetched
        assert not [url for url in fetched if re.search(r"(https?:)?//", url)], page.name


def test_what_pages_link_to_is_part_of_the_site(site):
    assert (site / "repository/release/results/learning_credit.png").is_file()
    assert (site / "repository/tuned_examples/gtpo_calculator_vllm.py").is_file()
    assert 'href="repository/CONTRIBUTING.html"' in (site / "estimators.html").read_text()
    reference = (site / "reference/config.html").read_text()
    assert "groups_per_step" in reference and "Trajectories of one prompt." in reference


def test_the_pictures_are_what_their_script_draws(tmp_path):
    drawn = subprocess.run(
        [sys.executable, "docs/pictures.py", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert drawn.returncode == 0, drawn.stderr
    pictures = sorted(path.name for path in tmp_path.iterdir())
    assert pictures == ["credit.svg", "iteration.svg", "turns.svg"]
    for name in pictures:
        committed = (ROOT / "docs" / "images" / name).read_text()
        assert committed == (tmp_path / name).read_text(), f"run docs/pictures.py: {name}"
