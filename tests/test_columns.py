"""Column mappings: each ready one on a row as its dataset has it, and what is refused."""

import pytest

from rllib_gtpo.columns import READY, column_mapping
from rllib_gtpo.errors import ConfigError, DataError

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "What is $1+1$?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
ROWS = {
    "dapo-math-17k": {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "2", "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": "9a9b6eb4"},
    },
    "dapo-math-17k-processed": {"prompt": "What is $1+1$?", "solution": "2", "ability": "MATH"},
    "gsm8k": {"question": "What is $1+1$?", "answer": "One and one is <<1+1=2>>2.\n#### 2"},
    "math": {"problem": "What is $1+1$?", "level": "Level 1", "solution": "It is $\\boxed{2}$."},
    "math-500": {"problem": "What is $1+1$?", "solution": "...", "answer": "2", "level": 1},
    "aime-2024": {"ID": "2024-I-1", "Problem": "What is $1+1$?", "Solution": "", "Answer": 2},
    "aime-2025": {"question": "What is $1+1$?", "answer": "2"},
    "amc": {"id": 0, "problem": "What is $1+1$?", "answer": 2.0, "url": ""},
    "svamp": {"ID": "c-1", "Body": "What is", "Question": "$1+1$?", "Answer": 2.0, "Type": "Add"},
    "minerva": {"question": "What is $1+1$?", "answer": "2"},
}


def mapped(columns, row, split="train"):
    return column_mapping(columns, split)(row, "rows.jsonl, row 7")


@pytest.mark.parametrize("name", READY)
def test_ready_mappings(name):
    task = mapped(name, ROWS[name])
    assert task["question"] == "What is $1+1$?"
    assert float(task["answer"]) == 2
    assert set(task) == {"question", "answer"}


@pytest.mark.parametrize("problem", ["problem", "question"])
def test_the_first_column_that_there_is(problem):
    assert mapped("aime-2025", {problem: "x", "answer": 70}) == {"question": "x", "answer": 70}


class TestOwnMappings:
    def test_nested_columns_and_names_with_dots(self):
        row = {"a": {"b": [{"c": 1}, {"c": 2}]}, "a.b": 3}
        assert mapped({"x": "a.b.1.c", "y": "a.b"}, row) == {"x": 2, "y": 3}

    def test_joined(self):
        assert mapped({"x": ["a", "b"]}, {"a": "How", "b": 2}) == {"x": "How 2"}

    def test_parts_of_texts(self):
        row = {
            "s": "Well, \\boxed{\\frac{1}{2}} then",
            "t": "a #### b #### c",
            "u": " please do it",
        }
        columns = {
            "s": {"column": "s", "boxed": True},
            "t": {"column": "t", "after": "####"},
            "u": {"column": "u", "without": "please"},
        }
        assert mapped(columns, row) == {"s": "\\frac{1}{2}", "t": "c", "u": "do it"}

    def test_none_leaves_rows_alone(self):
        assert column_mapping(None, "train") is None
        assert column_mapping({"test": "gsm8k"}, "train") is None


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ("gsm8k", {"question": "x", "answer": "2"}, "no '####' in the column 'answer' of 'answer'"),
        ("gsm8k", {"question": "x", "answer": 2}, "no text but int: leave out after"),
        ("math", {"problem": "x", "solution": "two"}, r"no \\boxed\{\}"),
        ("math-500", {"problem": "x", "Answer": "2"}, "no column 'answer'.*did you mean 'Answer'"),
        ("dapo-math-17k", {"prompt": []}, "no column 'prompt.0.content'"),
        ("dapo-math-17k", {"prompt": "x"}, "no column 'prompt.0.content'"),
        ("svamp", {"Body": "x"}, "no column 'Question'"),
    ],
)
def test_a_row_that_does_not_fit_is_named(columns, row, message):
    with pytest.raises(DataError, match=rf"^rows\.jsonl, row 7: .*{message}"):
        mapped(columns, row)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("dapo", "did you mean 'dapo-math-17k'"),
        (3, "ready mapping"),
        ({}, "ready mapping"),
        ({"question": 3}, "a column's name"),
        ({"question": []}, "a column's name"),
        ({"question": ["a", 3]}, "a column's name"),
        ({"question": {"columns": "a"}}, "did you mean 'column'"),
        ({"question": {"column": "a", "after": ""}}, "after=''"),
        ({"question": {"column": "a", "boxed": "yes"}}, "true or false"),
        ({"question": {"column": "a", "without": [3]}}, "without: texts"),
    ],
)
def test_what_is_no_mapping(columns, message):
    with pytest.raises(ConfigError, match=message):
        column_mapping(columns, "train")
