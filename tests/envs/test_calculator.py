"""The calculator: its tasks, its environment, and demonstrations that tell the truth about both."""

import random

import pytest

from rllib_gtpo.chat import call_format
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.types import StopReason, ToolError
from rllib_gtpo_envs import Calculator
from rllib_gtpo_envs.calculator import DEMONSTRATIONS

SMALL = {"train": 300, "validation": 60, "test": 60}
TASK = {"id": "t", "question": "12+7*3-5", "answer": "52", "operations": 3}
SPLITS = ("train", "validation", "test")


def say(*texts, task=TASK, env_config=None):
    """Plays the texts; returns the finished environment and what it said to each."""
    env = Calculator(env_config)
    env.reset(options={"task": task})
    answers = []
    try:
        for text in texts:
            observation, *_ = env.step(text)
            answers.append("".join(m["content"] for m in observation.messages))
    finally:
        env.close()
    return env, answers


def call(code):
    return f"```python\n{code}\n```"


def from_left_to_right(question):
    """The chain's results one after the other, by other means than the environment's."""
    numbers = question.replace("*", " * ").replace("+", " + ").replace("-", " - ").split()
    results = [int(numbers[0])]
    for operator, number in zip(numbers[1::2], numbers[2::2], strict=True):
        results.append(eval(f"({results[-1]}) {operator} {number}"))
    return results


class TestTasks:
    def test_no_problem_is_in_two_splits_or_twice_in_one(self):
        rows = {split: list(Calculator(SMALL).tasks(split)) for split in SPLITS}
        questions = [row["question"] for split in SPLITS for row in rows[split]]
        assert {split: len(rows[split]) for split in SPLITS} == SMALL
        assert len(set(questions)) == len(questions)

    def test_splits_are_disjoint_whatever_the_seeds(self):
        """The problem itself decides its split, so no run trains on the test set of another."""
        train = {
            r["question"] for seed in range(3) for r in _rows("train", seed, operations=[1, 1])
        }
        test = {r["question"] for seed in range(3) for r in _rows("test", seed, operations=[1, 1])}
        assert train
        assert not train & test

    @pytest.mark.parametrize("split", SPLITS)
    def test_tasks_are_a_function_of_seed_and_split(self, split):
        assert _rows(split, 1) == _rows(split, 1)
        assert _rows(split, 1) != _rows(split, 2)
        assert _rows(split, 1)[:10] == list(
            Calculator({**SMALL, "seed": 1, split: 10}).tasks(split)
        )

    def test_changing_a_row_changes_no_other_readers_row(self):
        _rows("train", 0)[0]["answer"] = "spoilt"
        assert _rows("train", 0)[0]["answer"] != "spoilt"

    def test_answers_and_bounds(self):
        config = {"operations": [1, 4], "numbers": [5, 20], "factors": [2, 3], "largest": 100}
        for row in _rows("train", 0, **config):
            results = from_left_to_right(row["question"])
            assert row["answer"] == str(results[-1])
            assert row["operations"] == len(results) - 1 in range(1, 5)
            assert all(0 <= r <= 100 for r in results)

    def test_operators(self):
        assert not any(set("+*") & set(r["question"]) for r in _rows("train", 0, operators="-"))

    def test_no_such_split(self):
        with pytest.raises(ConfigError, match="train, validation, test"):
            Calculator().tasks("dev")

    def test_too_few_problems_exist(self):
        with pytest.raises(ConfigError, match="not that many different problems"):
            _rows("train", 0, operations=[1, 1], numbers=[2, 5])


@pytest.mark.parametrize(
    ("env_config", "message"),
    [
        ({"operation": [1, 2]}, "did you mean 'operations'"),
        ({"zzz": 1}, "valid: seed, operations"),
        ({"operations": [0, 2]}, "1 to 8"),
        ({"operations": [3, 2]}, "1 to 8"),
        ({"operations": 3}, r"\[least, most\], 1 to 8"),
        ({"numbers": [2, 100_000]}, "0 to 99999"),
        ({"factors": [2.5, 3]}, "two whole numbers"),
        ({"operators": "/"}, "one or more of"),
        ({"operators": ""}, "one or more of"),
        ({"train": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
        ({"seed": True}, "a whole number"),
        ({"instructions": "yes"}, "true or false"),
        ({"demonstrations": {"gues": 1}}, "did you mean 'guess'"),
        ({"demonstrations": {"guess": -1}}, "at least 0"),
        ({"demonstrations": {"guess": 0}}, "above 0"),
        ({"demonstrations": "solve"}, "by name"),
    ],
)
def test_bad_knobs_say_what_is_valid(env_config, message):
    with pytest.raises(ConfigError, match=message):
        Calculator(env_config)


class TestEnvironment:
    def test_each_step_depends_on_the_last(self):
        env, answers = say(call("print(12+7)"), call("print(19*3)"), call("print(57-5)"), "52")
        assert answers == ["19\nleft: 19*3-5", "57\nleft: 57-5", "52\nleft: none", ""]
        assert env.trajectory.stop_reason is StopReason.ANSWER
        assert [t.rewards for t in env.trajectory.turns] == [
            {"format": 0.0},
            {"format": 0.0},
            {"format": 0.0},
            {"format": 0.0, "accuracy": 1.0},
        ]
        assert env.trajectory.correct

    def test_only_the_next_steps_result_moves_on(self):
        _, answers = say(call("print(7*3)"), call("1"), call("print(12+7*3-5)"), call("print(19)"))
        assert answers == [
            "21\nleft: 12+7*3-5",
            "(no output)\nleft: 12+7*3-5",
            "28\nleft: 12+7*3-5",
            "19\nleft: 19*3-5",
        ]

    def test_code_that_fails_is_no_format_error(self):
        env, answers = say(call("print(x+7)"), "3")
        assert answers[0] == "NameError: name 'x' is not defined\nleft: 12+7*3-5"
        first, last = env.trajectory.turns
        assert first.results[0].error is ToolError.RAISED
        assert first.rewards == {"format": 0.0}
        assert last.rewards == {"format": 0.0, "accuracy": 0.0}

    @pytest.mark.parametrize("text", ["```python\nprint(12+7)", "```py\nprint(12+7)\n```"])
    def test_a_malformed_call_is_penalised_and_changes_nothing(self, text):
        env, answers = say(text, call("print(12+7)"))
        assert answers[0].startswith("Error: ")
        assert answers[1] == "19\nleft: 19*3-5"
        assert [t.rewards["format"] for t in env.trajectory.turns] == [-0.1, 0.0]

    def test_no_call_at_all(self):
        env, _ = say("52")
        assert env.trajectory.turns[0].rewards == {"format": -0.1, "accuracy": 1.0}

    def test_the_session_keeps_its_state_until_the_next_reset(self):
        env = Calculator()
        for expected in ("19\nleft: 19*3-5", "19\nleft: 19*3-5"):
            env.reset(options={"task": TASK})
            env.step(call("x = 12"))
            observation, *_ = env.step(call("print(x + 7)"))
            assert observation.messages[0]["content"] == expected
        env.reset(options={"task": TASK})
        observation, *_ = env.step(call("print(x + 7)"))
        assert "NameError" in observation.messages[0]["content"]
        env.close()
        env.close()

    def test_turns_are_limited_a_little_above_what_it_takes(self):
        env, _ = say(*[call("print(0)")] * 6)
        assert env.trajectory.stop_reason is StopReason.MAX_TURNS
        assert env.trajectory.answer is None
        assert not env.trajectory.correct

    def test_prompt(self):
        assert Calculator().prompt(TASK) == "12+7*3-5"
        explained = Calculator({"instructions": True}).prompt(TASK)
        assert "12+7*3-5" in explained
        assert "left to right" in explained


class TestDemonstrations:
    @pytest.mark.parametrize("format_name", ["fenced", "hermes"])
    @pytest.mark.parametrize("behaviour", DEMONSTRATIONS)
    def test_the_environment_really_says_that(self, behaviour, format_name):
        """Played against the environment, a demonstration gets the very messages that it holds."""
        env = Calculator({**SMALL, "operations": [1, 4]})
        env.call_format = call_format(format_name)
        solves = behaviour in ("solve", "retry", "malformed")
        for row in list(env.tasks("train"))[:12]:
            env.reset(options={"task": row})
            demonstration = env.demonstrate(row, behaviour, random.Random(row["id"]))
            said = [m["content"] for m in demonstration if m["role"] == "assistant"]
            heard = [m["content"] for m in demonstration if m["role"] == "tool"]
            answers = []
            for text in said:
                observation, *_ = env.step(text)
                answers += [m["content"] for m in observation.messages]
            assert answers == heard
            assert env.trajectory.stop_reason is StopReason.ANSWER
            assert env.trajectory.correct == solves, demonstration
        env.close()

    def test_what_each_behaviour_looks_like(self):
        env, rng = Calculator(), random.Random(0)
        shown = {b: [m["content"] for m in env.demonstrate(TASK, b, rng)] for b in DEMONSTRATIONS}
        assert shown["solve"][::2] == [
            call("print(12+7)"),
            call("print(19*3)"),
            call("print(57-5)"),
            "52",
        ]
        assert len(shown["guess"]) == 1
        assert len(shown["retry"]) == len(shown["malformed"]) == len(shown["solve"]) + 2
        assert shown["stop_early"][-1] in ("19", "57")
        assert "NameError" in shown["ignore_error"][-2]
        assert sum("not closed" in text for text in shown["malformed"]) == 1

    def test_expert_is_a_function_of_the_id_and_follows_the_weights(self):
        env = Calculator({**SMALL, "train": 1000, "demonstrations": {"solve": 1, "guess": 3}})
        rows = list(env.tasks("train"))
        first = [next(iter(env.expert(row))) for row in rows]
        again = [next(iter(Calculator(env.env_config).expert(row))) for row in reversed(rows)]
        assert first == again[::-1]
        guesses = sum(len(demonstration) == 1 for demonstration in first)
        assert 700 < guesses < 800

    def test_default_weights_solve_less_than_half(self):
        assert sum(DEMONSTRATIONS.values()) == pytest.approx(1.0)
        assert sum(DEMONSTRATIONS[b] for b in ("solve", "retry", "malformed")) < 0.5


def _rows(split, seed, **env_config):
    return list(Calculator({**SMALL, "seed": seed, **env_config}).tasks(split))
