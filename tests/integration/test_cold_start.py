"""Supervised training: what it reads, that it resumes exactly, and that it runs once."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import pytest
import ray
import torch

from rllib_gtpo import GTPOConfig, SFTConfig
from rllib_gtpo.cold_start import ColdStart, Demonstrations, load_demonstrations
from rllib_gtpo.env_runner import GTPOEnvRunner
from rllib_gtpo.errors import ConfigError, DataError, GTPOError, Interrupted
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.packing import NOT_TRAINED, TokenSequence
from rllib_gtpo.supervision import validation_loss
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


class Late(GTPOEnvRunner):
    """Takes its time to take weights, or loses them."""

    loses = False

    def set_state(self, state):
        if self.worker_index and "rl_module" in state:
            if self.loses:
                return
            time.sleep(1.0)
        super().set_state(state)


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
        assert resumed.progress_made.cold_start.steps == 5
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

    def test_a_remote_runner_samples_with_the_newest_weights_or_not_at_all(
        self, ray_session, monkeypatch
    ):
        algorithm = config().env_runners(num_env_runners=1, env_runner_cls=Late).build_algo()
        gone = ray.remote(num_cpus=0)(Late).remote(config=None)
        ray.kill(gone)

        def lost(**call):
            monkeypatch.undo()
            return [gone.ping.remote()]

        monkeypatch.setattr(algorithm.env_runner_group._worker_manager, "_call_actors", lost)
        for version in (1, 2):
            result = algorithm.train()
            assert (result["group"]["lost_and_resampled"] > 0) == (version == 1)
            trained = algorithm.learner_group._learner.last_batch.trajectories
            assert {turn.weights_version for t in trained for turn in t.turns} == {version}
        algorithm.env_runner_group.foreach_env_runner(
            lambda runner: setattr(runner, "loses", True), local_env_runner=False
        )
        algorithm.train()
        with pytest.raises(GTPOError, match="has weights 3, though 4 were sent"):
            algorithm.train()
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


class TestBestWeights:
    """What follows a cold start goes on with the weights of the lowest held-out loss."""

    def spoiled(self, **cold_start):
        """Steps so large, from the sixth on, that the loss rises."""
        made = config(steps=10, validate_every=1, lr=3e-3, **cold_start).build_algo()
        learner = made.learner_group._learner
        losses, states = [], []
        step, loss = learner.supervised_step, learner.supervised_loss

        def supervised_step(batch, lr, grad_clip):
            done = made.progress_made.cold_start.steps
            return step(batch, 1.0 if done >= 5 else lr, grad_clip)

        def supervised_loss(sequences):
            losses.append(loss(sequences))
            states.append(weights(made))
            return losses[-1]

        learner.supervised_step, learner.supervised_loss = supervised_step, supervised_loss
        return made, losses, states

    def test_they_are_put_back(self, ray_session):
        made, losses, states = self.spoiled()
        made.run_cold_start_once()
        best = min(range(10), key=losses.__getitem__)
        assert best == 4 and losses[-1] > 2 * losses[best]
        assert same(weights(made), states[best])
        assert same(made.env_runner.module.get_state(), states[best])
        result = made.train()["cold_start"]
        assert (result["best_steps"], result["steps"]) == (5, 10)
        assert result["best_validation_loss"] == losses[best]
        assert result["validation_loss"] == losses[-1]
        assert made.learner_group._learner.best_weights is None  # nothing holds them any longer
        made.stop()

    def test_patience_ends_it_early(self, ray_session):
        made, losses, states = self.spoiled(patience=2)
        made.run_cold_start_once()
        assert len(losses) == 7 and made.progress_made.cold_start.steps == 7
        assert same(weights(made), states[4])
        made.stop()

    def test_they_are_in_a_checkpoint(self, ray_session, tmp_path):
        stopped, _, states = self.spoiled()
        loss, looks = stopped.learner_group._learner.supervised_loss, []

        def ask_after_seven(sequences):
            looks.append(1)
            if len(looks) == 7:
                stopped.request_stop()
            return loss(sequences)

        stopped.learner_group._learner.supervised_loss = ask_after_seven
        with pytest.raises(Interrupted, match="after step 7"):
            stopped.run_cold_start_once()
        path = stopped.save_to_path(str(tmp_path / "checkpoint"))
        resumed, *_ = self.spoiled()
        resumed.restore_from_path(path)
        resumed.run_cold_start_once()
        assert len(resumed.progress_made.cold_start.losses) == 10
        assert same(weights(resumed), states[4])
        for algorithm in (stopped, resumed):
            algorithm.stop()

    @pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
    def test_two_learners_measure_and_keep_the_same(self, ray_session, strategy):
        """The loss is one mean over the held-out demonstrations of all learners."""
        one = config(steps=4, validate_every=2).build_algo()
        two = config(steps=4, validate_every=2).learners(num_learners=2, strategy=strategy)
        two = two.build_algo()
        for algorithm in (one, two):
            algorithm.run_cold_start_once()
        first, second = (a.progress_made.cold_start for a in (one, two))
        assert list(first.losses) == list(second.losses) == [2, 4]
        assert list(second.losses.values()) == pytest.approx(list(first.losses.values()), rel=1e-4)
        assert first.best_steps == second.best_steps == 4
        for algorithm in (one, two):
            algorithm.stop()

    def test_the_loss_is_the_mean_over_what_the_assistant_wrote(self, ray_session):
        made = config().build_algo()
        data = made.load_demonstrations(made.cold_start)
        learner = made.learner_group._learner
        total, tokens = 0.0, 0
        for demo in data.validation:
            ids = torch.tensor([demo.token_ids])
            with torch.no_grad():
                logprobs = learner._unwrapped.model(ids).logits[0].log_softmax(-1)
            for place, turn in enumerate(demo.turns):
                if turn != NOT_TRAINED:
                    total -= float(logprobs[place - 1, demo.token_ids[place]])
                    tokens += 1
        assert validation_loss(made.learner_group, data) == pytest.approx(total / tokens, rel=1e-5)
        made.stop()


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

    def test_the_environment_answers_what_demonstrations_say(self):
        class Spoken(Adder):
            def expert(self, task):
                a, b = map(int, task["question"].split("+"))
                yield [self.tool_call("add", a=a, b=b), task["answer"]]

        class Written(Spoken):
            def expert(self, task):
                roles = ("assistant", "tool", "assistant")
                call, answer = next(super().expert(task))
                texts = zip(roles, (call, task["answer"], answer), strict=True)
                yield [{"role": role, "content": text} for role, text in texts]

        codec = config().build_codec()
        spoken, written = (
            load_demonstrations(ColdStart(), env(), codec, 0, 1000) for env in (Spoken, Written)
        )
        assert spoken.validation and spoken.validation == written.validation
        assert spoken.batch(0, 8) == written.batch(0, 8)

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            (["3", "4"], r"expert, task 1: the trajectory is over \(answer\) before its text 1"),
            (["3", {"role": "assistant", "content": "4"}], "all texts, or all messages"),
            (None, "has no tool 'ad'; did you mean 'add'"),
        ],
    )
    def test_a_demonstration_that_cannot_be_acted_out_is_named(self, said, message):
        class Wrong(Adder):
            def expert(self, task):
                yield said or [self.tool_call("ad", a=1, b=2)]

        with pytest.raises(DataError, match=message):
            load_demonstrations(ColdStart(), Wrong(), config().build_codec(), 0, 1000)

    def test_a_call_that_violates_the_schema_is_not_written(self):
        with pytest.raises(DataError, match="argument 'a' of tool 'add' must be integer"):
            Adder().tool_call("add", a="one", b=2)

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


@pytest.mark.parametrize("name", ["validate_every", "patience"])
def test_settings_of_validation_are_checked(name):
    with pytest.raises(ConfigError, match=f"cold_start.{name}=0: at least 1"):
        ColdStart.of({name: 0})
