"""Mathematics with a Python tool: the tool, the prompts, the grading, and the demonstrations."""

import asyncio
import json
import random
import re
import time

import pytest

from rllib_gtpo.chat import call_format
from rllib_gtpo.errors import ConfigError
from rllib_gtpo.models import build_tokenizer
from rllib_gtpo.types import StopReason, ToolError
from rllib_gtpo_envs import PythonMath
from rllib_gtpo_envs.chains import first_step
from rllib_gtpo_envs.word_problems import DAYS, DEMONSTRATIONS, EVENTS, MARKUP

SMALL = {"train": 300, "validation": 60, "test": 60}
TASK = {
    "id": "t",
    "question": "Ann has 23 pens. Monday: gets 17. Tuesday: loses 8. How many pens has Ann now?",
    "answer": "32",
    "chain": "23+17-8",
}
HARD = {"question": "Solve $x^2 = 1/4$ for the positive $x$.", "answer": "\\frac{1}{2}"}
SPLITS = ("train", "validation", "test")


def play(*texts, task=TASK, env_config=None, format_name="fenced"):
    """Plays the texts; returns the finished environment and what it said to each."""
    env = PythonMath(env_config)
    env.call_format = call_format(format_name)
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


def of_data(rows=(HARD,), **knobs):
    """An `env_config` with a dataset, which is all in memory."""
    return {"tasks": list(rows), **knobs}


class TestTool:
    def test_a_session_keeps_names_until_the_next_trajectory(self):
        env = PythonMath()
        for _ in range(2):
            env.reset(options={"task": TASK})
            assert "NameError" in env.step(call("print(x)"))[0].messages[0]["content"]
            env.step(call("x = 6"))
            assert env.step(call("print(x * 7)"))[0].messages[0]["content"] == "42"
        env.close()
        env.close()

    def test_without_a_session_every_call_runs_on_its_own(self):
        _, answers = play(call("x = 6"), call("print(x)"), env_config={"session": False})
        assert answers == ["(no output)", "NameError: name 'x' is not defined"]

    def test_both_call_formats(self):
        written = json.dumps({"name": "python", "arguments": {"code": "print(6 * 7)"}})
        assert play(f"<tool_call>{written}</tool_call>", format_name="hermes")[1] == ["42"]
        assert play(call("print(6 * 7)"))[1] == ["42"]

    def test_code_that_takes_too_long_is_ended_and_the_model_is_told(self):
        limits = {"cpu_seconds": 0.5}
        env, answers = play(
            call("while True: pass"), call("print(1)"), env_config={"limits": limits}
        )
        assert answers[0] == "[Timed out after 0.5 s of CPU time.]"
        assert answers[1].endswith("\n1")
        assert env.trajectory.turns[0].results[0].error is ToolError.TIMEOUT

    def test_memory_and_output_are_limited(self):
        config = {"limits": {"memory_mb": 64, "output_chars": 300}}
        _, answers = play(call("x = ' ' * 10**9"), call("print('ab' * 5000)"), env_config=config)
        assert "MemoryError" in answers[0]
        assert 200 < len(answers[1]) <= 300

    def test_datasets_show_whole_tracebacks_and_problems_from_a_seed_short_ones(self):
        code = call("def f():\n    return 1 / 0\nf()")
        assert play(code)[1] == ["ZeroDivisionError: division by zero"]
        (text,) = play(code, task=HARD, env_config=of_data(preload=[]))[1]
        assert text.startswith("Traceback") and text.endswith("division by zero")

    def test_sympy_is_there_for_datasets(self):
        code = call("print(sympy.sqrt(8), numpy.arange(3))")
        code = code.replace("print", "import sympy, numpy\nprint", 1)
        assert play(code, task=HARD, env_config=of_data())[1] == ["2*sqrt(2) [0 1 2]"]

    def test_problems_from_a_seed_need_neither_numpy_nor_sympy(self):
        assert PythonMath().python_preload == ()
        assert PythonMath(of_data()).python_preload == ("numpy", "sympy")

    def test_the_processes_end_with_the_trajectory(self):
        env, _ = play(call("print(1)"), "\\boxed{32}")
        assert env._session is None


class TestReward:
    @pytest.mark.parametrize(
        ("said", "accuracy"),
        [("\\boxed{32}", 1.0), ("It is \\boxed{32.0}", 1.0), ("\\boxed{33}", 0.0), ("?", 0.0)],
    )
    def test_the_answer_is_graded_by_value(self, said, accuracy):
        env, _ = play(call("print(1)"), said)
        assert env.trajectory.turns[-1].rewards == {"format": 0.0, "accuracy": accuracy}
        assert env.trajectory.correct == (accuracy == 1.0)
        assert env.trajectory.stop_reason is StopReason.ANSWER

    def test_formulas(self):
        for said, correct in (("\\boxed{2^{-1}}", True), ("\\boxed{\\frac{\\sqrt{2}}{3}}", False)):
            assert play(said, task=HARD, env_config=of_data())[0].trajectory.correct == correct

    def test_a_trajectory_that_was_cut_off_has_no_answer(self):
        env, _ = play(*[call("print('\\\\boxed{32}')")] * 6)
        assert env.trajectory.stop_reason is StopReason.MAX_TURNS
        assert env.trajectory.turns[-1].rewards == {"format": 0.0, "accuracy": 0.0}

    def test_the_trajectorys_answer_is_what_the_box_holds(self):
        assert play("So it is \\boxed{32}, I think.")[0].trajectory.answer == "32"

    def test_grading_holds_up_nobody(self, monkeypatch):
        """While one answer is graded, all the others are played."""
        from rllib_gtpo.rewards.answer import AnswerChecker, Verdict

        graded = []

        async def slow(self, given, reference, kind="math"):
            await asyncio.sleep(0.5)
            graded.append(given)
            return Verdict(True, "exact")

        monkeypatch.setattr(AnswerChecker, "acheck", slow)
        envs = [PythonMath() for _ in range(20)]
        for env in envs:
            env.reset(options={"task": TASK})

        async def all_at_once():
            await asyncio.gather(*(env.astep("\\boxed{1}") for env in envs))

        began = time.perf_counter()
        asyncio.run(all_at_once())
        assert time.perf_counter() - began < 5  # one after the other it takes 10 s
        assert len(graded) == 20 and all(env.trajectory.correct for env in envs)


class TestPrompt:
    def test_problems_from_a_seed_are_shown_by_themselves(self):
        assert PythonMath().first_messages(TASK) == [{"role": "user", "content": TASK["question"]}]

    @pytest.mark.parametrize(
        ("format_name", "example"),
        [
            ("fenced", "```python\nprint(2**10)\n```"),
            (
                "hermes",
                '<tool_call>\n{"name": "python", "arguments": {"code": "print(2**10)"}}\n'
                "</tool_call>",
            ),
        ],
    )
    def test_the_tool_is_explained_in_the_format_in_use(self, format_name, example):
        env = PythonMath(of_data(limits={"cpu_seconds": 3, "memory_mb": 512}))
        env.call_format = call_format(format_name)
        system, user = env.first_messages(HARD)
        assert user == {"role": "user", "content": HARD["question"]}
        for text in (example, "\\boxed{", "3 seconds", "512 MB", "numpy and sympy", "stay from"):
            assert text in system["content"]
        call = env.call_format.parse(system["content"].replace("\\boxed", ""), env.tool_schemas)
        assert call.calls[0].arguments == {"code": "print(2**10)"}  # the example is a valid call

    def test_without_a_session_the_model_is_told_so(self):
        system, _ = PythonMath(of_data(session=False)).first_messages(HARD)
        assert "on its own" in system["content"] and "stay from" not in system["content"]

    def test_texts_of_ones_own(self):
        config = of_data(system="Be brief.", prompt_template="Problem {x}: {question}\nGo.")
        assert PythonMath(config).first_messages(HARD) == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Problem {{x}}: {HARD['question']}\nGo."},
        ]
        assert len(PythonMath(of_data(system="")).first_messages(HARD)) == 1
        assert len(PythonMath(of_data(instructions=False)).first_messages(HARD)) == 1


@pytest.mark.parametrize(
    ("env_config", "message"),
    [
        ({"task": "x.jsonl"}, "did you mean 'tasks'"),
        ({"operations": [2, 8]}, "1 to 7"),
        ({"operators": "/"}, "one or more of"),
        ({"train": 0}, "at least 1"),
        ({"session": 1}, "true or false"),
        ({"instructions": "yes"}, "true or false"),
        ({"limits": {"cpu_second": 3}}, "did you mean 'cpu_seconds'"),
        ({"limits": {"cpu_seconds": "3"}}, "a number"),
        ({"limits": {"memory_mb": 0}}, "positive"),
        ({"limits": 3}, "for each limit"),
        ({"preload": "sympy"}, "a list of modules"),
        ({"preload": ["no_such_module"]}, "no module 'no_such_module' here: install"),
        ({"system": 3}, "a text"),
        ({"system": "x", "instructions": True}, "choose one"),
        ({"prompt_template": "{problem}"}, r"\{question\} in it, once"),
        ({"columns": "gsm8k"}, "no effect without `tasks`"),
        ({"tasks": [HARD], "operations": [1, 2]}, "operations: without effect"),
        ({"sandbox": "http://127.0.0.1:9"}, "stateful=False|keeps no names"),
        ({"demonstrations": {"gues": 1}}, "did you mean 'guess'"),
    ],
)
def test_bad_knobs_say_what_is_valid(env_config, message):
    with pytest.raises(ConfigError, match=message):
        PythonMath(env_config)


class TestProblems:
    def test_no_problem_is_in_two_splits_or_twice_in_one(self):
        rows = {split: list(PythonMath(SMALL).tasks(split)) for split in SPLITS}
        questions = [row["question"] for split in SPLITS for row in rows[split]]
        assert {split: len(rows[split]) for split in SPLITS} == SMALL
        assert len(set(questions)) == len(questions)

    def test_the_text_tells_the_chain(self):
        """Read back by other means, the text gives the answer."""
        signs = {event.split(" {}")[0]: sign for sign, events in EVENTS.items() for event in events}
        for row in PythonMath({**SMALL, "operations": [1, 7]}).tasks("train"):
            first, *days, question = row["question"].split(". ")
            name, _, value, thing = first.split(" ")
            for day, text in zip(DAYS, days, strict=False):
                number = re.search(r"\d+", text)[0]
                sign = signs[text.removeprefix(f"{day}:").partition(f" {number}")[0]]
                value = eval(f"{value}{sign}{number}")
            assert row["answer"] == str(value)
            assert question == f"How many {thing} has {name} now?"

    def test_tasks_are_a_function_of_seed_and_split(self):
        one, same, other = (list(PythonMath({**SMALL, "seed": s}).tasks("test")) for s in (1, 1, 2))
        assert one == same != other


class TestDemonstrations:
    @pytest.mark.parametrize("session", [True, False])
    @pytest.mark.parametrize("format_name", ["fenced", "hermes"])
    @pytest.mark.parametrize("behaviour", DEMONSTRATIONS)
    def test_the_environment_really_says_that(self, behaviour, format_name, session):
        """Played against the environment, a demonstration gets the very messages that it holds."""
        env = PythonMath({**SMALL, "operations": [1, 4], "session": session})
        env.call_format = call_format(format_name)
        solves = behaviour in ("solve", "retry", "malformed")
        for row in list(env.tasks("train"))[:8]:
            env.reset(options={"task": row})
            demonstration = env.demonstrate(row, behaviour, random.Random(row["id"]))
            heard = [m["content"] for m in demonstration if m["role"] == "tool"]
            answers = []
            for message in demonstration:
                if message["role"] == "assistant":
                    observation, *_ = env.step(message["content"])
                    answers += [m["content"] for m in observation.messages]
            assert answers == heard
            assert env.trajectory.stop_reason is StopReason.ANSWER
            assert env.trajectory.correct == solves, demonstration
        env.close()

    def test_expert_follows_the_weights(self):
        env = PythonMath({**SMALL, "train": 600, "demonstrations": {"solve": 1, "guess": 3}})
        shown = [next(iter(env.expert(row))) for row in env.tasks("train")]
        assert 410 < sum(len(demonstration) == 1 for demonstration in shown) < 490

    def test_a_dataset_has_none(self):
        assert list(PythonMath(of_data()).expert(HARD)) == []

    def test_the_markup_keeps_texts_short(self):
        tokenizer = build_tokenizer(MARKUP)
        env = PythonMath(SMALL)
        for row in env.tasks("train"):
            assert first_step(row["chain"]) is not None
            assert len(tokenizer.encode(row["question"])) <= 24
            for message in next(iter(env.expert(row))):
                assert len(tokenizer.encode(message["content"])) <= 16, message
