"""Metrics and settings that the pages name exist."""

from __future__ import annotations

import re

import pytest

from rllib_gtpo import GTPOConfig
from rllib_gtpo.types import StopReason
from tests.docs.pages import PAGES, ROOT

TABLES = [ROOT / "docs" / name for name in ("settings.md", "scaling.md", "debugging.md")]
SOURCE = "".join(path.read_text() for path in (ROOT / "rllib_gtpo").rglob("*.py"))
OF_RLLIB = ("env_runners", "evaluation")  # the places that RLlib gives to runners and evaluations


def patterns(form):
    """All strings of the package of a form; what an f-string fills in is any word."""
    names = set(re.findall(f'"({form})"', SOURCE))
    return {re.sub(r"\\\{.*?\\\}", r"[\\w-]+", re.escape(name)) for name in names}


METRICS = patterns(r"[a-z_]+/[\w./{}\[\]]+|[a-z_{}]+/[a-z_]+")
WORDS = patterns(r"[a-z_]+(?:@{\w+})?")


def exists(name):
    place, _, rest = name.partition("/")
    known = re.escape(name).replace(r"\*", ".+")
    if any(re.fullmatch(p, name) or re.fullmatch(known, p) for p in METRICS):
        return True
    if place not in OF_RLLIB:
        return False
    rest = rest.replace("_at_", "@")  # MLflow wants `avg_at_4`
    return exists(rest) if "/" in rest else any(re.fullmatch(p, rest) for p in WORDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_metrics_of_a_page_exist(page):
    places = {pattern.partition("/")[0] for pattern in METRICS}.union(OF_RLLIB)
    for name in re.findall(r"`([a-z_]+/[a-z_*/0-9A-Z]*[a-z_*0-9])`", page.read_text()):
        is_path = (ROOT / name).exists()
        assert is_path or name.partition("/")[0] not in places or exists(name), name


def test_the_tables_name_settings_of_the_config():
    known = GTPOConfig().setting_names()
    for page in TABLES:
        for name in re.findall(r"`([a-z_]+)=", page.read_text()):
            assert name in known, f"{page.name}: {name}"


def test_a_stop_reason_is_one():
    text = "".join(page.read_text() for page in PAGES)
    for name in re.findall(r"`stop/([a-z_]+)`", text):
        assert name in set(StopReason), name


@pytest.mark.parametrize("name", ["README.md", "docs/limits.md", "docs/estimators.md"])
def test_what_the_study_is_quoted_with_is_in_the_study(name):
    study = (ROOT / "docs" / "learning_study.md").read_text().replace("+", "")
    figures = re.findall(r"[\d.]+% \[-?[\d.]+, -?[\d.]+\]", (ROOT / name).read_text())
    assert figures
    for figure in figures:
        assert figure in study, f"{name}: {figure}"
