"""What the README shows works as written."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_task_of_the_readme_works():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    env, config = names["env"], names["config"]
    assert env.trajectory.turns[0].results[0].content == "Employees have 30 days of leave."
    *_, terminated, _, _ = env.step("30")
    assert terminated and env.trajectory.correct
    config.validate()
    assert names["stop"]


def test_the_settings_of_the_readme_are_the_settings():
    from rllib_gtpo import GTPOConfig

    known = GTPOConfig().setting_names()
    rows = re.findall(
        r"^\| `\.(language_model|rollouts|training|rewards)\(\)` \| (.*) \|$", README, re.M
    )
    assert len(rows) == 4
    for _, settings in rows:
        for name in re.findall(r"`(\w+)`", settings):
            assert name in known, name


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r"(?:tuned_examples|release|tests)/[\w/.]+\w", README):
        assert (ROOT / name).exists(), name
