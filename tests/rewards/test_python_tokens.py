"""The offline embedder: what makes no difference, what does, and that any text will do."""

from __future__ import annotations

import keyword
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_gtpo.rewards.embedders.python_tokens import PythonTokens, normalized_tokens

EMBEDDER = PythonTokens()
# Programs whose variables are written @0, @1, ...
TEMPLATES = [
    "@0 = 2\n@1 = @0 * 3\nprint(@1 + @0)\n",
    "def @0(@1, @2=1):\n    @3 = @1 ** @2\n    return @3\n\nprint(@0(2, @2=5))\n",
    "@0 = [@1 for @1 in range(10) if @1 % 2]\nprint(sum(@0), f'{@0[0]} of {len(@0):>4}')\n",
    "import math as @0\nwith open('f') as @1:\n    for @2, @3 in enumerate(@1):\n"
    "        print(@0.sqrt(@2), @3.strip())\n",
    "try:\n    @0 = int(input())\nexcept ValueError as @1:\n    print(@1)\n"
    "@2 = lambda @3: @3 + @0\n",
    "class @0:\n    def area(self, @1):\n        return self.side * @1\n\n(@2 := @0()).area(3)\n",
]
NAMES = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(
    lambda n: not keyword.iskeyword(n) and n not in TAKEN
)
TAKEN = set(re.findall(r"[a-z_]+", " ".join(TEMPLATES))) | set(keyword.softkwlist) | {"match"}


def similarity(one, other):
    first, second = EMBEDDER.embed([one, other])
    return float(first @ second)


def named(template, names):
    return re.sub(r"@(\d)", lambda m: names[int(m.group(1))], template)


templates = st.sampled_from(TEMPLATES)
four_names = st.lists(NAMES, min_size=4, max_size=4, unique=True)


@given(templates, four_names, four_names)
@settings(deadline=None)
def test_names_of_variables_make_no_difference(template, names, others):
    assert similarity(named(template, names), named(template, others)) == pytest.approx(1.0)


@given(templates, st.sampled_from(["  ", "\t", " " * 8]), st.data())
@settings(deadline=None)
def test_spacing_and_comments_make_no_difference(template, indent, data):
    code = named(template, ["a", "b", "c", "d"])
    lines = []
    for line in code.split("\n"):
        body = line.lstrip()
        # Around signs that no string of the templates holds.
        spaced = data.draw(st.sampled_from([r"\1", r" \1 "]))
        body = re.sub(r"\s*(:=|[+*=]+|,)\s*", spaced, body)
        comment = data.draw(st.sampled_from(["", "  # why", " #"]))
        lines.append(indent * ((len(line) - len(line.lstrip())) // 4) + body + comment)
        lines += data.draw(st.sampled_from([[], [""], ["# a remark", "   "]]))
    again = "\n".join(lines)
    assert normalized_tokens(again) == normalized_tokens(code)
    assert similarity(code, again) == pytest.approx(1.0)


@given(templates, templates, four_names)
@settings(deadline=None)
def test_different_programs_differ(one, other, names):
    if one != other:
        assert similarity(named(one, names), named(other, names)) < 0.6


@given(st.integers(0, 99), st.integers(0, 99), st.sampled_from("+-*/%"), st.sampled_from("+-*/%"))
@settings(deadline=None)
def test_numbers_and_operators_make_a_difference(a, b, sign, other):
    code = f"print({a} {sign} {b})"
    changed = [f"print({a + 1} {sign} {b})"]
    changed += [f"print({a} {other} {b})"] if sign != other else []
    for different in changed:
        assert similarity(code, different) < 0.8


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_has_a_unit_vector(text):
    (vector,) = EMBEDDER.embed([text])
    assert vector.dtype == np.float32 and vector.shape == (4096,)
    assert np.linalg.norm(vector) == pytest.approx(1.0)


FRAGMENTS = [
    "def ",
    "f(",
    ")",
    ":\n",
    "    ",
    "\t",
    "'''",
    '"',
    'f"{',
    "}",
    "\\",
    "\n",
    "x = ",
    "0",
]
FRAGMENTS += ["class A", "lambda", "é", "\x00", "\r", "\x0c", "\u2028", "# c", "$", "😀", "\ud800"]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join))
@settings(max_examples=300, deadline=None)
def test_almost_python_has_a_unit_vector(text):
    (vector,) = EMBEDDER.embed([text])
    assert np.linalg.norm(vector) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "code",
    ["(" * 1000, "[" * 50_000, "-" * 20_000 + "1", "x = " + "+".join("1" * 20_000), "a." * 9999],
)
def test_deep_nesting(code):
    assert np.linalg.norm(EMBEDDER.embed([code])[0]) == pytest.approx(1.0)


def test_the_wrong_sign():
    assert similarity("print(2+3)", "print(2*3)") == pytest.approx(9 / 15)


@pytest.mark.parametrize(
    ("code", "tokens"),
    [
        ("x = y", "v0 = y"),
        ("x = x.x", "v0 = v0 . x"),
        ("print = 3", "v0 = 3"),
        ("import math\nprint(math.pi)", "import math <newline> print ( math . pi )"),
        ("import numpy as np\nnp", "import numpy as v0 <newline> v0"),
        ("from a import b\nb()", "from a import b <newline> b ( )"),
        ("end = 1\nprint(2, end=end)", "v0 = 1 <newline> print ( 2 , end = v0 )"),
        ("def f(n): return n\nf(n=2)", "def v0 ( v1 ) : return v1 <newline> v0 ( v1 = 2 )"),
        ("s = 'a' \"b\"", "v0 = 'a' 'b'"),
        ("s = r'\\d'", "v0 = '\\\\d'"),
        ("a = 1\nprint((a", "v0 = 1 <newline> print ( ( v0"),
        ("a = 1\nb = = 2\na", "v0 = 1 <newline> b = = 2 <newline> v0"),
        ("a = 1\ns = '''a b", "v0 = 1 <newline> s = ' ' ' v0 b"),
        ("# nothing", "<nothing>"),
    ],
)
def test_what_is_kept_and_what_is_numbered(code, tokens):
    assert " ".join(normalized_tokens(code)) == tokens


def test_one_bad_line_does_not_change_the_rest():
    good = "total = 0\nfor item in range(5):\n    total += item\nprint(total)\n"
    assert similarity(good, good + "print(total\n") > 0.9
    assert similarity(good, good.replace("total", "t").replace("item", "i") + "t t\n") > 0.9


def test_line_ends_of_windows():
    code = "x = 1\nprint(x)\n"
    assert similarity(code, code.replace("\n", "\r\n")) == pytest.approx(1.0)


def test_settings_change_vectors_and_identity():
    short = PythonTokens(ngrams=1, dimensions=64)
    assert short.embed(["x"])[0].shape == (64,)
    assert short.embed(["a b"])[0] @ short.embed(["b a"])[0] == pytest.approx(1.0)
    assert short.identity != EMBEDDER.identity
    assert EMBEDDER.embed([]) == []
