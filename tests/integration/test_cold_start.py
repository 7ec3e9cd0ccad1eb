"""Supervised training: what it reads, that it resumes exactly, and that it runs once."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from rllib_gtpo import GTPOConfig, SFTConfig
from rllib_gtpo.cold_start import ColdStart, Demonstrations, load_demonstrations
from rllib_gtpo.errors import DataError, Interrupted
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.packing import TokenSequence
from tests.tasks import MARKUP, Adder


def config(kind=GTPOConfig, steps=12, **cold_start):
    return (
        kind()
        .environment(Adder)
        .language_model(
            tokenizer=build_tokenizer(MARKUP),
            cold_start={"steps": steps, "batch_size": 8, "lr": 3e-3, **cold_start},
        )
        .rollouts(max_turn_tokens=32)
        .training(lr=1e-3, group_size=2, groups_per_step=2)
        .reporting(progress=False)
        .debugging(seed=4)
    )


def weights(algorithm):
    state = algorithm.learner_group.get_state(components="learner/rl_module")
    return state["learner"]["rl_module"]["default_policy"]


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


class TestRuns:
    def test_stopped_and_resumed_is_the_same_as_not_stopped(self, ray_session, tmp_path):
        whole = config().build_algo()
        whole.run_cold_start_once()

        stopped = config().build_algo()
        step = stopped.learner_group._learner.supervised_step
        calls = []

        def ask_after_five(*args):
            calls.append(1)
            if len(calls) == 5:
                stopped.request_stop()
            return step(*args)

        stopped.learner_group._learner.supervised_step = ask_after_five
        with pytest.raises(Interrupted, match="after step 5"):
            stopped.run_cold_start_once()
        path = stopped.save_to_path(str(tmp_path / "checkpoint"))

        resumed = config().build_algo()
        resumed.restore_from_path(path)
        assert resumed.progress_made.cold_start_steps == 5
        resumed.run_cold_start_once()
        assert same(weights(whole), weights(resumed))
        assert not same(weights(whole), weights(stopped))
        for algorithm in (whole, stopped, resumed):
            algorithm.stop()

    def test_it_runs_once_and_rl_starts_with_a_fresh_optimizer(self, ray_session):
        algorithm = config().build_algo()
        algorithm.train()
        learner = algorithm.learner_group._learner
        assert algorithm.progress_made.cold_start_done
        assert not learner.get_optimizer("default_policy", "supervised").state
        assert learner.get_optimizer("default_policy", "policy").state
        before = weights(algorithm)
        algorithm.run_cold_start_once()
        assert same(before, weights(algorithm))
        runner = algorithm.env_runner.module.get_state()
        assert same(before, runner)
        algorithm.stop()

    def test_sft_is_the_same_training_in_iterations(self, ray_session):
        whole = config().build_algo()
        whole.run_cold_start_once()
        sft = config(SFTConfig).training(steps_per_iteration=5).build_algo()
        steps = [sft.train()["sft"]["steps"] for _ in range(3)]
        assert steps == [5, 10, 12]
        assert same(weights(whole), weights(sft))
        for algorithm in (whole, sft):
            algorithm.stop()

    def test_two_learners_learn_the_same(self, ray_session):
        one, two = config().build_algo(), config().learners(num_learners=2).build_algo()
        start = weights(one)
        one.run_cold_start_once()
        two.run_cold_start_once()
        change = max((weights(one)[k] - start[k]).abs().max().item() for k in start)
        apart = max((weights(one)[k] - weights(two)[k]).abs().max().item() for k in start)
        assert apart <= 0.01 * change
        for algorithm in (one, two):
            algorithm.stop()


class TestData:
    def load(self, path, context=1000):
        start = ColdStart.of({"data": str(path)})
        return load_demonstrations(start, Adder(), config().build_codec(), 0, context)

    def test_a_file_of_conversations(self, tmp_path):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": "1+1"},
                    {"role": "assistant", "content": "2"},
                ]
            }
        ] * 3
        path = tmp_path / "demos.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        data = self.load(path)
        assert len(data) == 3
        assert data.batch(0, 1)[0].num_trained == 2  # "2" and the end of the turn

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ('{"messages": [{"role": "user"}]}', "row 2: message 1: has no content: expected"),
            ("nonsense", "row 2"),
            ('{"messages": [{"role": "user", "content": "x"}]}', "row 2: has no assistant message"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path, row, message):
        good = {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        }
        path = tmp_path / "demos.jsonl"
        path.write_text(json.dumps(good) + "\n" + row + "\n")
        with pytest.raises(DataError, match=message):
            self.load(path)

    def test_no_file(self, tmp_path):
        with pytest.raises(DataError, match="no such file"):
            self.load(tmp_path / "nothing.jsonl")

    def test_an_environment_without_demonstrations_says_what_to_do(self):
        class Silent(Adder):
            def expert(self, task):
                return ()

        with pytest.raises(DataError, match="override expert"):
            load_demonstrations(ColdStart(), Silent(), config().build_codec(), 0, 1000)

    def test_demonstrations_that_are_too_long_are_left_out(self, capsys):
        start, codec = ColdStart(), config().build_codec()
        everything = load_demonstrations(start, Adder(), codec, 0, 1000)
        some = load_demonstrations(start, Adder(), codec, 0, 30)
        assert 0 < len(some) < len(everything)
        assert "longer than 30 tokens" in capsys.readouterr().out
        with pytest.raises(DataError, match="longer than the context of 3 tokens"):
            load_demonstrations(start, Adder(), codec, 0, 3)

    def test_the_order_is_a_function_of_seed_and_position(self):
        rows = [TokenSequence([i], [0], [0.0]) for i in range(100)]
        data = Demonstrations(rows, seed=1)
        assert data.batch(3, 4) == Demonstrations(rows, seed=1).batch(3, 4)
        assert data.batch(3, 4) != Demonstrations(rows, seed=2).batch(3, 4)
        epoch = [s.token_ids[0] for s in data.batch(0, 90)]
        assert sorted(epoch) == list(range(10, 100))  # ten are held out


def test_the_learning_rate_warms_up_and_decays():
    start = ColdStart(steps=100, lr=1.0, warmup=0.1, final_lr_frac=0.1)
    rates = [start.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0) and rates[99] == pytest.approx(0.1, abs=0.02)
    assert all(a >= b for a, b in pairwise(rates[10:]))
