"""A short turn of every fuzz target, and every case that was ever found.

`release/fuzz.py` runs the same targets for as long as one likes.
"""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.targets import LONGEST, TARGETS, check_answers, check_calls

CORPUS = sorted(Path(__file__).parent.joinpath("corpus").glob("*.json"))
EXAMPLES = {"calls": 60, "answers": 40, "graded": 4, "sandbox": 8}


@pytest.mark.parametrize("name", TARGETS)
def test_a_short_turn(name):
    target = TARGETS[name]

    @settings(
        max_examples=EXAMPLES.get(name, 150),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def run(case):
        target.check(case)

    run()


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_what_was_found(path):
    found = json.loads(path.read_text())
    TARGETS[found["target"]].check(found["case"])


REPEATED = [
    *("<tool_call>", "<tool_call>{}</tool_call>", "</tool_call>", "<think>", "<think></think>"),
    *(
        "<",
        "```",
        "```python\n",
        "```python\nx\n```\n",
        "`",
        "`\n",
        "```a",
        "```\n",
        "```js\n```\n",
    ),
    *(
        "\n",
        " ",
        "[",
        '{"a":',
        "9",
        "<tool_call><think>",
        "```python\n\n\n",
        "\n```",
        "\\ud800",
        '"',
    ),
    *("\\boxed{", "{", "}", "\\boxed ", "Answer:", "####", "The answer is ", "$", ",1", ".1", "1/"),
    *("a ", "a.", "\\frac{1}{", "\\d", "-", "\\(x\\)", "**", "{}", "\\boxed{1}", "\\\\"),
]


@pytest.mark.parametrize("piece", REPEATED)
@pytest.mark.parametrize("before", ["", "<tool_call>", "Answer: \\boxed{"])
def test_long_texts_take_no_longer_than_they_must(before, piece):
    text = (before + piece * LONGEST)[:LONGEST]
    check_calls(text)
    check_answers([text, text[:4000], "1"])
