"""The study of learning: its statistics by hand, its plan, and one tiny study from end to end."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from release.learning import blame, leakage, oracles, study, tables, training
from release.learning.run import main
from release.learning.tables import area
from release.results import renewed
from rllib_gtpo.rewards.embedders import build_embedder
from rllib_gtpo.rewards.shaping import Shaping

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "release" / "results"
PINNED = {
    "chain": "fd28cb02291cb663",
    "lookup": "3d0746d8e02b4b6b",
    "repair": "c6ba6deea7bc3b34",
    "short_chain": "6390241e1330122a",
}


class TestArea:
    def test_by_hand(self):
        assert area([0, 50, 100], [0.0, 1.0, 1.0], 100) == pytest.approx(0.75)

    def test_what_lies_beyond_the_budget_does_not_count(self):
        assert area([0, 100, 200], [0.0, 1.0, 9.0], 100) == pytest.approx(0.5)
        assert area([0, 200], [0.0, 1.0], 100) == pytest.approx(0.25)


class TestPlan:
    def test_every_arm_is_a_valid_configuration(self):
        """So that no setting of the study is without effect."""
        from rllib_gtpo import GTPOConfig

        for name, planned in study.STUDIES.items():
            for task in planned.tasks:
                for arm, settings in planned.arms.items():
                    config = GTPOConfig().environment(study.TASKS[task].env)
                    config.training(**study.TASKS[task].training)
                    config.update_from_dict(dict(settings))
                    config.validate()
                    assert config.lr == study.TASKS[task].training["lr"], (name, arm)

    @pytest.mark.parametrize("name", PINNED)
    def test_tasks_are_those_of_the_records(self, name):
        """Whoever changes a task on purpose runs its study again, and pins it anew."""
        task = study.TASKS[name]
        env = task.env({**task.env_config, "train": 50, "seed": 0})
        rows = list(env.tasks("train"))
        told = [[env.prompt(row), list(env.expert(row))] for row in rows]
        assert hashlib.sha256(json.dumps([rows, told]).encode()).hexdigest()[:16] == PINNED[name]

    def test_the_same_run_in_two_studies_is_made_once(self):
        credit, normalize = study.STUDIES["credit"], study.STUDIES["normalize"]
        shared = credit.run("lookup", "gtpo_unshaped", 1)
        assert normalize.run("lookup", "group", 1) == shared
        assert shared.name != credit.run("lookup", "gtpo_unshaped", 2).name
        assert shared.name != credit.run("lookup", "gtpo", 1).name

    def test_tasks_that_pay_by_the_turn_start_from_the_same_models(self):
        credit, stepwise = study.STUDIES["credit"], study.STUDIES["turn_rewards"]
        starts = {run.start for run in credit.runs()}
        assert {run.start for run in stepwise.runs()} <= starts
        assert not {run.name for run in stepwise.runs()} & {run.name for run in credit.runs()}

    def test_all_studies_can_be_asked_for_at_once(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("sys.argv", ["run.py", "--tables", "--records", str(tmp_path)])
        assert main() == 1  # nothing is there yet
        printed = capsys.readouterr().out
        assert all(f"## {name}:" in printed for name in study.STUDIES)

    def test_seeds_are_completed_one_after_the_other(self):
        runs = study.STUDIES["credit"].runs()
        assert [r.seed for r in runs] == sorted(r.seed for r in runs)
        assert len(set(runs)) == len(runs) == 75


class TestRecords:
    def test_the_docs_show_the_recorded_results(self):
        docs = (ROOT / "docs" / "learning_study.md").read_text()
        shown = {}
        for table in re.findall(r"<!-- table: (.+?) -->", docs):
            name = table.removesuffix(" by turn")
            if name in study.STUDIES:
                planned = study.STUDIES[name]
                values, rows = tables.read(planned, RESULTS / "learning")
                assert len(rows) == len(planned.runs())
                shown[table] = (
                    tables.table(planned, tables.compare(planned, values))
                    if table == name
                    else tables.by_turn_table(planned, values)
                )
        assert study.STUDIES.keys() <= shown.keys()
        for name, module in (("blame", blame), ("leakage", leakage)):
            recorded = json.loads((RESULTS / f"{name}.json").read_text())
            shown[name] = module.table(recorded["metrics"])
        assert renewed(docs, shown) == docs

    def test_every_record_is_of_a_run_that_is_planned(self):
        planned = {run.name for s in study.STUDIES.values() for run in s.runs()}
        assert {file.stem for file in (RESULTS / "learning").glob("*.json")} <= planned

    def test_a_page_without_the_place_for_a_table_is_refused(self):
        with pytest.raises(ValueError, match="no place for the table 'b'"):
            renewed("<!-- table: a -->\n<!-- end -->", {"b": "x"})


class TestBlame:
    def test_auc_by_hand(self):
        values, right = np.array([3.0, 1.0, 2.0, 1.0]), np.array([True, True, False, False])
        assert blame.auc(values, right) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
        assert np.isnan(blame.auc(values, np.array([True] * 4)))

    def test_first_error_is_compared_with_what_came_before(self):
        gap = blame.first_error_gap(
            [np.array([1.0, 2.0, 0.5]), np.array([9.0, 9.0])],
            [np.array([True, True, False]), np.array([False, True])],  # nothing before the error
        )
        assert gap == pytest.approx(0.5 - 1.5)

    @pytest.mark.parametrize(
        ("task", "behaviour", "right"),
        [
            ("chain", "solve", [True] * 4),
            ("chain", "stop_early", None),
            ("lookup", "solve", [True] * 5),
            ("lookup", "wrong_turn", None),
            ("repair", "careful", None),
        ],
    )
    def test_oracles_judge_demonstrations(self, task, behaviour, right):
        """An expert's turns are all right; whoever fails on purpose has a wrong turn."""
        config = {**study.TASKS[task].env_config, "train": 30, "seed": 1}
        config |= {"operations": [3, 3]} if task == "chain" else {"slips": {}}
        config |= {"hops": [3, 3]} if task == "lookup" else {}
        env = study.TASKS[task].env(config)
        for row in list(env.tasks("train"))[:8]:
            told = env.demonstrate(row, behaviour, random.Random(0))
            env.reset(options={"task": row})
            for message in told:
                if message["role"] == "assistant":
                    env.step(message["content"])
            judged = oracles.ORACLES[task](env.trajectory)
            if behaviour == "careful":
                assert all(judged)
            else:
                assert judged == right if right else not all(judged)
            env.close()


@pytest.mark.parametrize("name", ["chain_steps", "lookup_steps"])
def test_a_stepwise_task_pays_right_calls_and_no_answer(name):
    task = study.TASKS[name]
    spotless = {"slips": {}} if name == "lookup_steps" else {}
    env = task.env({**task.env_config, "train": 5, **spotless})
    row = next(iter(env.tasks("train")))
    env.reset(options={"task": row})
    told = [m["content"] for m in env.demonstrate(row, "solve", random.Random(0))]
    env.step("```look\nnone:z\n```" if name == "lookup_steps" else "```python\nprint(-1)\n```")
    for said in told[::2]:
        env.step(said)
    paid = [turn.rewards["step"] for turn in env.trajectory.turns]
    assert paid == [0.0, *[oracles.STEP_REWARD] * (len(paid) - 2), 0.0]
    assert env.trajectory.correct
    env.close()


def test_leakage_kinds_are_wrong_and_a_copy_is_worth_alpha():
    for name, right in leakage.RIGHT.items():
        assert right not in leakage.wrong_programs(name).values()
    shaping = Shaping(build_embedder("python_tokens"))
    leaked = leakage.leaked(shaping)
    assert max(leaked["unrelated"]) < min(leaked["one operator"]) < 0.5


@pytest.mark.slow
def test_a_tiny_study_trains_resumes_and_reports(ray_session, tmp_path, monkeypatch):
    chain = study.TASKS["chain"]
    small = replace(
        chain,
        budget=400,
        cold_start={**chain.cold_start, "steps": 20, "demonstrations": 400},
        env_config={**chain.env_config, "train": 400},
        training={**chain.training, "group_size": 4, "groups_per_step": 2},
    )
    monkeypatch.setitem(study.TASKS, "chain", small)
    monkeypatch.setattr(training, "PROBLEMS", 8)
    planned = study.Study(
        "?",
        ("chain",),
        {"a": study.UNSHAPED, "b": {"estimator": "grpo_sum"}},
        baselines=("b",),
        seeds=(0, 1),
    )
    for run in planned.runs():
        training.make_cold_start(*run.start, tmp_path)
        file = training.train(run, tmp_path, tmp_path)
        record = json.loads(file.read_text())
        assert record["curve"][-1]["tokens"] >= 400 > record["curve"][0]["tokens"] == 0
        assert record["iterations"]["tokens/sampled_lifetime"][-1] == record["curve"][-1]["tokens"]
        before = file.stat().st_mtime_ns
        assert training.train(run, tmp_path, tmp_path).stat().st_mtime_ns == before
    values, rows = tables.read(planned, tmp_path)
    assert len(rows) == 4
    assert rows[0]["start"] == rows[2]["start"]  # arms of a seed start from one model
    compared = tables.compare(planned, values)
    assert {"final_vs_b", "area_vs_b_relative"} <= set(compared[0])
    assert "| chain | a | 2 |" in tables.table(planned, compared)
