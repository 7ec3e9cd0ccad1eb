"""The record of real training steps holds what was sampled and the learner's own numbers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from rllib_gtpo import record
from rllib_gtpo.record.schema import SCHEMA
from rllib_gtpo.report import build_report
from tests.report.test_report import embedded


def built(config, directory, **reporting):
    algorithm = config.reporting(**{"record": 1.0, **reporting}).build_algo()
    algorithm.run_directory = str(directory)
    return algorithm


@pytest.fixture(scope="module")
def trained(adder_model, tmp_path_factory):
    """Two iterations of several optimizer steps each, and what the learner kept of the last one."""
    from rllib_gtpo import GTPOConfig
    from tests.tasks import Adder

    config = (
        GTPOConfig()
        .environment(Adder)
        .language_model(model=adder_model)
        .rollouts(max_turn_tokens=64)
        .rewards(shaping="mean", shaping_input="trajectory")
        .training(lr=5e-3, group_size=4, groups_per_step=6, epochs=2, mini_batches=2, clip_low=0.1)
        .reporting(progress=False, record=1.0)
        .debugging(seed=3, deterministic=True)
    )
    directory = tmp_path_factory.mktemp("run")
    algorithm = built(config, directory)
    algorithm.train()
    result = algorithm.train()
    learner = algorithm.learner_group._learner
    batch, trace = learner.last_batch, learner._trace
    algorithm.stop()
    return directory, result, batch, trace


def last_rows(directory):
    files = record.record_files(directory)
    assert [file.iteration for file in files] == [1, 2]
    return files[-1].read().to_pylist()


def test_credit_is_the_learners_bit_for_bit(trained):
    directory, _, batch, _ = trained
    rows = last_rows(directory)
    turns = [turn for row in rows for turn in row["turns"]]
    assert len(rows) == 24 == len(batch.trajectories)
    for name in ("return", "baseline", "scale", "advantage"):
        column = {"return": "returns", "advantage": "advantages"}.get(name, name)
        mine = torch.tensor([turn[name] for turn in turns], dtype=torch.float64)
        assert torch.equal(mine, getattr(batch.credit, column))
    assert any(turn["advantage"] for turn in turns)


def test_so_are_the_numbers_of_a_report(trained):
    directory, _, batch, _ = trained
    build_report(str(directory))
    page = directory / "report.html"
    shown = {}
    for line in embedded(page, "overview")["groups"]:
        group = embedded(page, f"chunk-{line['chunk']}")[line["place"]]
        for t in group["trajectories"]:
            shown[group["iteration"], group["id"], t["member"]] = t["turns"]
    turns = [turn for t in batch.trajectories for turn in shown[2, t.group_id, t.member]]
    for name, column in (("return", "returns"), ("baseline", "baseline"), ("scale", "scale")):
        mine = torch.tensor([turn[name] for turn in turns], dtype=torch.float64)
        assert torch.equal(mine, getattr(batch.credit, column))
    advantages = [turn["advantage"] for turn in turns]
    assert advantages == batch.credit.advantages.tolist()


def test_tokens_turns_masks_and_logprobs_are_those_that_were_sampled(trained):
    directory, _, batch, _ = trained
    for row, t in zip(last_rows(directory), batch.trajectories, strict=True):
        ids, turns, logprobs = [], [], []
        for turn in t.turns:
            ids += turn.prompt_ids + turn.token_ids
            turns += [-1] * len(turn.prompt_ids) + [turn.index] * len(turn.token_ids)
            logprobs += [None] * len(turn.prompt_ids) + turn.logprobs
        assert row["token_ids"] == ids and row["turn_ids"] == turns
        assert row["mask"] == [turn >= 0 for turn in turns] and row["trained"]
        known = [(a, b) for a, b in zip(row["logprobs"], logprobs, strict=True) if b is not None]
        assert np.array_equal(*np.array(known, dtype=np.float32).T)
        assert [a is None for a in row["logprobs"]] == [b is None for b in logprobs]
        assert "".join(row["tokens"]).startswith("<|im_start|>user\n")


def test_ratios_and_clips_add_up_to_the_reported_ones(trained):
    """The metrics are means over the optimizer steps; of the last epoch's we have the tokens."""
    directory, _, batch, trace = trained
    rows = last_rows(directory)
    ratios = [r for row in rows for r in row["ratios"] if r is not None]
    assert len(ratios) == sum(t.num_trained_tokens for t in batch.trajectories)
    assert any(abs(r - 1.0) > 1e-3 for r in ratios)
    advantages = [
        row["turns"][k]["advantage"]
        for row in rows
        for k, on in zip(row["turn_ids"], row["mask"], strict=True)
        if on
    ]
    clipped = [c for row in rows for c in row["clipped"] if c is not None]
    expected = [
        (a > 0 and r > 1.28) or (a < 0 and r < 0.9) for r, a in zip(ratios, advantages, strict=True)
    ]
    assert clipped == expected and any(clipped) and not all(clipped)
    last = [step for step in trace._steps][len(trace._steps) // 2 :]
    seen = torch.cat([(now - anchor).exp() for _, _, now, anchor in last])
    assert sorted(seen.tolist()) == pytest.approx(sorted(ratios))


def test_the_learners_logprobs_are_near_the_samplers(trained):
    rows = last_rows(trained[0])
    gaps = [
        abs(a - b)
        for row in rows
        for a, b in zip(row["logprobs"], row["learner_logprobs"], strict=True)
        if a is not None
    ]
    assert gaps and max(gaps) < 1e-3


def test_rewards_messages_and_calls(trained):
    directory, _, batch, _ = trained
    rows = last_rows(directory)
    for row, t in zip(rows, batch.trajectories, strict=True):
        assert [{r["name"]: r["value"] for r in turn["rewards"]} for turn in row["turns"]] == [
            turn.rewards for turn in t.turns
        ]
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        assert said == [turn.text for turn in t.turns]
        told = [m["content"] for m in row["messages"] if m["role"] == "tool"]
        assert set(told) >= {r.content for turn in t.turns[:-1] for r in turn.results}
        assert row["messages"][0] == {"role": "user", "content": t.task["question"], "other": None}
        assert json.loads(row["task"]) == t.task and row["task_id"] == t.task["id"]
        assert json.loads(row["tools"])[0]["function"]["name"] == "add"
        assert (row["stop_reason"], row["correct"]) == (t.stop_reason.value, t.correct)
        calls = [(c["name"], json.loads(c["arguments"])) for u in row["turns"] for c in u["calls"]]
        assert calls == [(c.name, c.arguments) for u in t.turns for c in u.calls]
        assert all(turn["seconds"] > 0.0 for turn in row["turns"])


def test_the_shaping_term_and_the_siblings_that_it_came_from(trained):
    rows = record.record_files(trained[0])[0].read().to_pylist()
    shaped = [(row, row["turns"][-1]) for row in rows if row["similarities"]]
    assert shaped
    for row, last in shaped:
        value = next(r["value"] for r in last["rewards"] if r["name"] == "shaping")
        alike = [one["similarity"] for one in row["similarities"]]
        assert value == pytest.approx(0.5 * sum(alike) / len(alike)) and not row["correct"]
        right = {r["member"] for r in rows if r["group_id"] == row["group_id"] and r["correct"]}
        assert {one["member"] for one in row["similarities"]} == right


def test_one_line_gives_a_dataset(trained):
    dataset = record.load(trained[0])
    assert len(dataset) == 48 and dataset.column_names == SCHEMA.names
    assert set(dataset["iteration"]) == {1, 2}
    assert dataset[30]["turns"][0]["advantage"] == last_rows(trained[0])[6]["turns"][0]["advantage"]
    some = record.load(trained[0], columns=["stop_reason", "reward"], last=1)
    assert some.shape == (24, 2)


def test_groups_can_be_credited_again(trained):
    """What a reader needs to ask another estimator."""
    from rllib_gtpo.connectors.learner import credit_of

    directory, _, batch, _ = trained
    file = record.record_files(directory)[-1]
    groups = record.groups_of_rows(file.read().to_pylist())
    about = file.about
    again = credit_of(groups, about["estimator"], about["gamma"], about["estimator_options"])
    assert torch.equal(again.advantages, batch.credit.advantages)


@pytest.mark.parametrize("learners", [0, 2])
def test_a_share_of_the_groups(adder_config, tmp_path, learners):
    """Whole groups; with two learners, each tells of its own."""
    config = adder_config(groups_per_step=8).learners(num_learners=learners)
    algorithm = built(config, tmp_path, record=0.5)
    result = algorithm.train()
    algorithm.stop()
    (file,) = record.record_files(tmp_path)
    rows = file.read().to_pylist()
    ids = [row["group_id"] for row in rows]
    assert len(set(ids)) == 4 and all(ids.count(i) == 4 for i in ids)
    assert result["record"]["trajectories"] == 16.0 and file.about["sampled_groups"] == 8
    assert all(t["advantage"] is not None for row in rows for t in row["turns"])
    assert all(row["trained"] for row in rows)


def test_groups_that_are_not_trained_on_have_no_credit(adder_config, tmp_path):
    algorithm = built(adder_config(groups_per_step=8, uniform_groups="drop"), tmp_path)
    algorithm.train()
    kept = {t.group_id for t in algorithm.learner_group._learner.last_batch.trajectories}
    algorithm.stop()
    rows = record.record_files(tmp_path)[0].read().to_pylist()
    assert kept and kept < {row["group_id"] for row in rows}
    for row in rows:
        on = row["group_id"] in kept
        assert row["in_batch"] == row["trained"] == any(row["mask"]) == on
        assert all((turn["advantage"] is not None) == on for turn in row["turns"])
        assert all(r is None for r in row["ratios"]) == (not on)


def test_masked_trajectories_have_credit_and_no_trained_token(adder_config, tmp_path):
    config = adder_config(groups_per_step=8, overlong="mask").rollouts(max_turn_tokens=3)
    algorithm = built(config, tmp_path)
    algorithm.train()
    algorithm.stop()
    rows = record.record_files(tmp_path)[0].read().to_pylist()
    cut = [row for row in rows if row["stop_reason"] == "turn_truncated"]
    assert cut
    for row in cut:
        assert row["in_batch"] and not row["trained"] and not any(row["mask"])
        assert all(turn["advantage"] is not None for turn in row["turns"])


def test_none_records_nothing(adder_config, tmp_path):
    algorithm = built(adder_config(), tmp_path, record="none")
    result = algorithm.train()
    assert algorithm.learner_group._learner._trace is None and "record" not in result
    algorithm.stop()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_does_not_end_the_training(adder_config, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    algorithm = built(adder_config(), blocked)
    algorithm.train()
    algorithm.train()
    algorithm.stop()
    assert capsys.readouterr().err.count("the record is not being written") == 1


def test_a_resumed_run_drops_what_it_had_recorded_after_its_checkpoint(adder_config, tmp_path):
    algorithm = built(adder_config(), tmp_path)
    for _ in range(3):
        algorithm.train()
    algorithm.stop()
    resumed = built(adder_config(), tmp_path)
    resumed._iteration = 1
    resumed.train()
    resumed.stop()
    assert [file.iteration for file in record.record_files(tmp_path)] == [1, 2]


def test_it_can_be_kept_elsewhere(adder_config, tmp_path):
    """Each run has a directory of its own there, and its own directory says where."""
    names = []
    for run in ("a/run", "b/run", "b/run"):
        algorithm = built(adder_config(), tmp_path / run, record={"path": f"{tmp_path}/all"})
        algorithm.train()
        algorithm.stop()
        names.append(sorted(path.name for path in (tmp_path / "all").iterdir()))
    assert names == [["run"], ["run", "run-1"], ["run", "run-1"]]
    found = [record.load(tmp_path / run) for run in ("a/run", "b/run")]
    assert [len(rows) for rows in found] == [4, 4]
