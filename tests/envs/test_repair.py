"""Programs to mend: tasks, judging, hostile code, and demonstrations that tell the truth."""

import random

import pytest

from rllib_gtpo.chat import call_format
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.types import StopReason, ToolError
from rllib_gtpo_envs import Repair
from rllib_gtpo_envs.repair import DEMONSTRATIONS, MARKUP, OPERATORS, SLIPS

SMALL = {"train": 300, "validation": 60, "test": 60}
HARD = {"lines": [4, 4], "wrong": [3, 4], "operators": OPERATORS, "spare_turns": 2}
SPLITS = ("train", "validation", "test")
TASK = {
    "id": "t",
    "question": "a+=3\nb*=a\nc-=7\na+= wrong\nb*= ok\nc-= wrong",
    "answer": "a*=3\nb*=a\nc+=7",
    "wrong": 2,
}


def tasks(split="train", **env_config):
    return list(Repair({**SMALL, **env_config}).tasks(split))


def report(code, wrong):
    """What the tool says to lines such as `a+=3`."""
    heads = [line[:3] for line in code.split("\n")]
    return "\n".join(f"{head} {'wrong' if head[0] in wrong else 'ok'}" for head in heads)


def halves(question):
    """The given program, and the report on it."""
    lines = question.split("\n")
    return "\n".join(lines[: len(lines) // 2]), "\n".join(lines[len(lines) // 2 :])


def call(code):
    return f"```submit\n{code}\n```"


def play(*texts, task=TASK, env_config=None):
    """Plays the texts; returns the finished environment and what it said to each."""
    env = Repair(env_config)
    env.reset(options={"task": task})
    answers = []
    try:
        for text in texts:
            observation, *_ = env.step(text)
            answers.append("".join(m["content"] for m in observation.messages))
    finally:
        env.close()
    return env, answers


def submit(*codes, **options):
    return play(*map(call, codes), **options)


class TestTasks:
    def test_no_problem_is_in_two_splits_or_twice_in_one(self):
        rows = {split: tasks(split) for split in SPLITS}
        questions = [row["question"] for split in SPLITS for row in rows[split]]
        assert {split: len(rows[split]) for split in SPLITS} == SMALL
        assert len(set(questions)) == len(questions)

    def test_splits_are_disjoint_whatever_the_seeds(self):
        few = {"lines": [2, 2], "wrong": [1, 1], "operators": OPERATORS}
        train = {r["question"] for seed in range(3) for r in tasks("train", seed=seed, **few)}
        test = {r["question"] for seed in range(3) for r in tasks("test", seed=seed, **few)}
        assert train
        assert not train & test

    @pytest.mark.parametrize("split", SPLITS)
    def test_tasks_are_a_function_of_seed_and_split(self, split):
        assert tasks(split, seed=1) == tasks(split, seed=1)
        assert tasks(split, seed=1) != tasks(split, seed=2)

    def test_exactly_the_wrong_lines_differ_from_the_answer(self):
        for row in tasks(lines=[2, 4], wrong=[1, 2]):
            program, said = halves(row["question"])
            given = program.split("\n")
            right = row["answer"].split("\n")
            differ = [r for g, r in zip(given, right, strict=True) if g != r]
            assert said == report(program, [line[0] for line in differ])
            assert row["wrong"] == len(differ) in (1, 2)
            assert len(given) in (2, 3, 4)

    def test_running_the_answer_passes_and_the_given_program_fails(self):
        for row in tasks()[:30]:
            program, said = halves(row["question"])
            env, answers = submit(program, row["answer"], task=row)
            assert answers == [said, "passed"]
            assert env.trajectory.correct

    def test_operators(self):
        for row in tasks(operators="+-*"):
            assert not set("&|^") & set(row["question"] + row["answer"])

    def test_no_such_split(self):
        with pytest.raises(ConfigError, match="train, validation, test"):
            Repair().tasks("dev")


@pytest.mark.parametrize(
    ("env_config", "message"),
    [
        ({"line": [3, 4]}, "did you mean 'lines'"),
        ({"lines": [4, 5]}, "1 to 4"),
        ({"lines": [2, 4], "wrong": [2, 3]}, "fewer lines"),
        ({"wrong": [0, 2]}, "1 to 4"),
        ({"operators": "+"}, "two or more"),
        ({"operators": "++"}, "each once"),
        ({"operators": "+/"}, "two or more"),
        ({"operators": 3}, "two or more"),
        ({"spare_turns": -1}, "at least 0"),
        ({"carelessness": 1}, "below 1"),
        ({"carelessness": "0.1"}, "below 1"),
        ({"seed": -1}, "at least 0"),
        ({"train": 2.5}, "a whole number"),
        ({"instructions": 1}, "true or false"),
        ({"demonstrations": {"carefull": 1}}, "did you mean 'careful'"),
        ({"slips": {"repeats": 0.1}}, "did you mean 'repeat'"),
        ({"slips": {"repeat": 1}}, "below 1"),
    ],
)
def test_bad_knobs_say_what_is_valid(env_config, message):
    with pytest.raises(ConfigError, match=message):
        Repair(env_config)


class TestEnvironment:
    def test_it_ends_when_the_tests_pass(self):
        first, second = "a*=3\nb*=a\nc&=7", "a*=3\nb*=a\nc+=7"
        env, answers = submit(first, second)
        assert answers == [report(first, "c"), "passed"]
        assert env.trajectory.stop_reason is StopReason.ENV_DONE
        assert [t.rewards for t in env.trajectory.turns] == [
            {"format": 0.0},
            {"format": 0.0, "accuracy": 1.0},
        ]
        assert env.trajectory.correct
        assert env.trajectory.code == f"{first}\n{second}"

    def test_a_wrong_line_does_not_spoil_later_ones(self):
        codes = ["a-=3\nb*=a\nc+=7", "a*=3\nb+=a\nc+=7", "a-=3\nb-=a\nc-=7"]
        _, answers = submit(*codes)
        assert answers == [report(codes[0], "a"), report(codes[1], "b"), report(codes[2], "abc")]

    def test_any_program_with_the_right_values_passes(self):
        code = "# tripled\nif a:\n    a = a + a + a\nb = b * a; c = c - -7"
        assert submit(code)[1] == ["passed"]

    def test_a_missing_variable_is_wrong(self):
        assert submit("a*=3\nb*=a\ndel c")[1] == ["a*= ok\nb*= ok\nc wrong"]

    def test_nothing_is_remembered_from_one_submission_to_the_next(self):
        assert submit("a*=3\nb*=a\nc+=6", "b*=a")[1][1] == "a wrong\nb*= ok\nc wrong"

    @pytest.mark.parametrize(
        ("code", "error"), [("a*=", "SyntaxError: invalid syntax"), ("a=y", "NameError: name 'y'")]
    )
    def test_code_that_fails_is_no_format_error(self, code, error):
        env, answers = submit(code, "a*=3\nb*=a\nc+=7")
        assert "ok" not in answers[0] and f"c wrong\n{error}" in answers[0]
        assert answers[1] == "passed"
        assert env.trajectory.turns[0].results[0].error is ToolError.RAISED
        assert env.trajectory.turns[0].rewards == {"format": 0.0}

    def test_giving_up_fails(self):
        env, _ = play(call("a-=3\nb*=a\nc-=7"), "give up")
        assert env.trajectory.stop_reason is StopReason.ANSWER
        assert env.trajectory.turns[-1].rewards == {"format": 0.0, "accuracy": 0.0}
        env, _ = play("a*=3\nb*=a\nc+=7")  # the right program, but not submitted
        assert env.trajectory.turns[-1].rewards == {"format": -0.1, "accuracy": 0.0}

    def test_an_unclosed_call_is_penalised_and_runs_nothing(self):
        env, answers = play(f"```submit\n{TASK['answer']}", call(TASK["answer"]))
        assert answers[0].startswith("Error: ")
        assert answers[1] == "passed"
        assert [t.rewards["format"] for t in env.trajectory.turns] == [-0.1, 0.0]

    def test_turns_are_limited_a_little_above_trying_everything(self):
        env, _ = submit(*["a=1"] * 5, env_config={"operators": "+-*", "spare_turns": 3})
        assert env.trajectory.stop_reason is StopReason.MAX_TURNS
        assert env.trajectory.turns[-1].rewards == {"format": 0.0, "accuracy": 0.0}

    def test_a_new_trajectory_has_not_passed(self):
        env = Repair()
        env.reset(options={"task": TASK})
        env.step(call(TASK["answer"]))
        env.reset(options={"task": TASK})
        env.step("give up")
        assert not env.trajectory.correct
        env.close()
        env.close()

    def test_prompt(self):
        assert Repair().prompt(TASK) == TASK["question"]
        explained = Repair({"instructions": True}).prompt(TASK)
        assert "a+=3\nb*=a\nc-=7" in explained
        assert "a+= wrong\nb*= ok\nc-= wrong" in explained


class TestHostileCode:
    @pytest.mark.parametrize(
        "code",
        [
            "import os; os._exit(0)",
            "import sys; sys.exit(0)",
            "print('passed')",
            "class passed(Exception): pass\nraise passed",
            "raise Exception('passed')",
            "a=b=c='passed'",
            "class Same:\n __eq__ = lambda *_: True\n __repr__ = lambda s: 'passed'\na=b=c=Same()",
            "import os; os.write(1, b'passed\\n'); os._exit(0)",
            "a=b=c=10**5000",
            "while True: a += 1",
            "a='1'*10**10",
            "print('9 9 9\\n' * 100)",
            "_results.clear()",
            "'''",
            "\\",
        ],
    )
    def test_it_fails_and_the_next_submission_is_judged_as_ever(self, code):
        env, answers = submit(code, "a*=3\nb*=a\nc-=7", TASK["answer"])
        assert answers[0].count(" wrong") == 3
        assert answers[2] == "passed"
        assert env.trajectory.stop_reason is StopReason.ENV_DONE

    def test_code_that_breaks_its_own_process_harms_no_other_trajectory(self):
        code = "import builtins; builtins.print = lambda *_: None"
        answers = submit(code, TASK["answer"])[1]
        assert all(answer.count(" wrong") == 3 for answer in answers)
        assert submit(TASK["answer"])[1] == ["passed"]

    def test_the_right_program_is_not_where_the_code_runs(self):
        """Whatever it can reach: its frames, its arguments, its environment."""
        code = (
            "import sys, os, gc\nf = sys._getframe()\nseen = ''\n"
            "while f:\n    seen += repr(f.f_locals) + repr(f.f_globals)\n    f = f.f_back\n"
            "seen += repr(sys.argv) + repr(os.environ) + repr(gc.get_objects())\n"
            "raise SystemError('a' + chr(42) + '=3' in seen)"
        )
        _, answers = submit(code)
        assert answers[0].endswith("SystemError: False")


class TestDemonstrations:
    @pytest.mark.parametrize("format_name", ["fenced", "hermes"])
    @pytest.mark.parametrize("behaviour", DEMONSTRATIONS)
    @pytest.mark.parametrize("slips", [{}, {"repeat": 0.4}, {"malformed": 0.4}], ids=str)
    def test_the_environment_really_says_that(self, behaviour, format_name, slips):
        """Played against the environment, a demonstration gets the very messages that it holds."""
        env = Repair({**SMALL, "slips": slips})
        env.call_format = call_format(format_name)
        malformed = 0
        for row in env.tasks("train")[:15]:
            env.reset(options={"task": row})
            demonstration = env.demonstrate(row, behaviour, random.Random(row["id"]))
            heard = [m["content"] for m in demonstration if m["role"] == "tool"]
            answers = []
            for message in demonstration:
                if message["role"] == "assistant":
                    observation, *_ = env.step(message["content"])
                    answers += [m["content"] for m in observation.messages]
            assert answers == heard
            assert env.trajectory.stop_reason is not None
            assert env.trajectory.correct == (heard[-1:] == ["passed"])
            malformed += sum("not closed" in text for text in heard)
        env.close()
        assert (malformed > 0) == ("malformed" in slips)

    def test_careful_never_tries_again_and_keeps_what_works(self):
        env = Repair({**SMALL, "slips": {}})
        for row in env.tasks("train")[:60]:
            said = [m["content"] for m in env.demonstrate(row, "careful", random.Random(row["id"]))]
            given, verdict = halves(row["question"])
            last, seen_wrong = given.split("\n"), set()
            for text, answer in zip(said[::2], said[1::2], strict=True):
                program = text.removeprefix("```submit\n").removesuffix("\n```").split("\n")
                wrong = [x[0] for x in verdict.split("\n") if x.endswith("wrong")]
                seen_wrong |= {line for line in last if line[0] in wrong}
                assert not seen_wrong & set(program)
                assert all(line in program for line in last if line[0] not in wrong)
                last, verdict = program, answer
            assert verdict == "passed"

    def test_the_others_fail_more_often(self):
        env = Repair({**SMALL, **HARD})
        rows = env.tasks("train")

        def passes(behaviour):
            shown = [env.demonstrate(r, behaviour, random.Random(r["id"])) for r in rows]
            return sum(d[-1]["content"] == "passed" for d in shown) / len(rows)

        assert passes("careful") > 0.8
        assert passes("careless") < 0.4
        assert passes("give_up") < 0.2

    def test_expert_is_a_function_of_the_id_and_follows_the_weights(self):
        config = {
            **SMALL,
            **HARD,
            "train": 400,
            "slips": {},
            "demonstrations": {"careful": 3, "give_up": 1},
        }
        env = Repair(config)
        rows = env.tasks("train")
        first = [next(iter(env.expert(row))) for row in rows]
        again = [next(iter(Repair(config).expert(row))) for row in reversed(rows)]
        assert first == again[::-1]
        assert 60 < sum(d[-1]["content"] == "give up" for d in first) < 120

    def test_default_weights_and_slips(self):
        assert sum(DEMONSTRATIONS.values()) == pytest.approx(1.0)
        assert 0.1 <= sum(SLIPS.values()) <= 0.25


def test_the_markup_keeps_turns_short():
    tokenizer = build_tokenizer(MARKUP)
    env = Repair({**SMALL, "lines": [4, 4]})
    for row in env.tasks("train")[:50]:
        for message in next(iter(env.expert(row))):
            tokens = len(tokenizer.encode(message["content"]))
            assert tokens <= (10 if message["role"] == "assistant" else 8), message
