"""Checking answers: the pairs that graders get wrong, attacks, extraction, and properties."""

from __future__ import annotations

import asyncio
import string
import time
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rllib_gtpo.errors import ConfigError, DataError, RewardError
from rllib_gtpo.rewards import answer
from rllib_gtpo.rewards.answer import (
    AnswerChecker,
    Verdict,
    exact_match,
    extract_answer,
    f1_score,
    shared_checker,
)
from tests.rewards.answer_pairs import DIFFERENT, EQUAL

LIMIT = 2.0  # seconds that one answer may cost


@pytest.fixture(scope="module")
def checker():
    checker = AnswerChecker(LIMIT)
    assert checker.check(r"\sqrt{18}", r"3\sqrt{2}") == Verdict(True, "verified")
    yield checker
    checker.close()


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_equal_answers_are_equal_in_both_directions(checker, a, b):
    assert checker.check(a, b).correct
    assert checker.check(b, a).correct


@pytest.mark.parametrize(("a", "b"), DIFFERENT)
def test_different_answers_are_different_in_both_directions(checker, a, b):
    assert not checker.check(a, b).correct
    assert not checker.check(b, a).correct


def test_how_says_which_layer_decided(checker):
    assert checker.check("42", 42) == Verdict(True, "exact")
    assert checker.check("42.0", 42) == Verdict(True, "normalised")
    assert checker.check("(x+1)^2", "x^2+2x+1") == Verdict(True, "verified")
    assert checker.check("(x+1)^2", "x^2+2x+2") == Verdict(False, "different")
    assert checker.check(r"x+\nothing(", "x+1") == Verdict(False, "unparsable")
    assert checker.check(None, "1") == Verdict(False, "missing")
    assert checker.check(" ", "1") == Verdict(False, "missing")
    assert checker.check("9^{9^{9^9}}", "7^x") == Verdict(False, "timeout")


def test_plain_answers_need_no_process():
    checker = AnswerChecker()
    for a, b in (("0.5", r"\frac12"), ("7", "8"), ("Paris", "Rome"), ("(1,2]", "[1,2)")):
        checker.check(a, b)
    assert checker._sandbox is None
    assert checker.counts == {"normalised": 1, "different": 3}


def test_any_of_several_references_is_accepted(checker):
    assert checker.check("NYC", ["New York City", "NYC"]).correct
    assert checker.check(r"\sqrt{8}", ["3", r"2\sqrt{2}"]) == Verdict(True, "verified")
    assert not checker.check("4", ["3", r"2\sqrt{2}"]).correct
    assert checker.check("2.5", 2.5).correct
    assert checker.check(5, "5").correct
    assert checker.check(["5"], "5") == Verdict(False, "unparsable")
    assert checker.check(10**5000, "5") == Verdict(False, "unparsable")


@pytest.mark.parametrize(
    ("given", "correct"), [("b", True), ("(B)", True), ("B) 12", True), ("C", False), ("12", False)]
)
def test_a_choice_is_its_letter(checker, given, correct):
    assert checker.check(given, "B", kind="choice").correct is correct


def test_words_are_compared_as_squad_does(checker):
    assert exact_match("The Eiffel-Tower!", "eiffeltower")
    assert not exact_match("Eiffel", ["Eiffel Tower", "Tower"])
    assert f1_score("the big cat", "a cat") == pytest.approx(2 / 3)  # P = 1/2, R = 1
    assert f1_score("dog", ["cat", "hot dog"]) == pytest.approx(2 / 3)
    assert f1_score("", "cat") == f1_score(None, "cat") == 0.0
    assert f1_score("the", "a") == 1.0  # nothing is left of either
    assert checker.check("An apple", "apple", kind="exact") == Verdict(True, "normalised")
    assert checker.check("1/2", "0.5", kind="exact") == Verdict(False, "different")
    assert checker.check("world hello", "hello world", kind="f1").correct
    assert not checker.check("world", "hello world", kind="f1").correct


def test_wrong_use_is_refused(checker):
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        checker.check("1", "1", kind="maths")
    with pytest.raises(DataError, match="NoneType"):
        checker.check("1", None)
    with pytest.raises(DataError, match="empty list"):
        checker.check("1", [])
    with pytest.raises(ConfigError, match="positive"):
        AnswerChecker(seconds=0)


def test_a_host_that_cannot_grade_raises(monkeypatch):
    def refuse(*_, **__):
        raise answer.SandboxUnavailable("no processes left")

    monkeypatch.setattr(answer, "PythonSandbox", refuse)
    checker = AnswerChecker()
    assert checker.check("1", "1.0").correct  # needs no process
    with pytest.raises(RewardError, match="no processes left"):
        checker.check(r"\sqrt{2}", r"\sqrt{3}")
    with pytest.raises(RewardError, match="no processes left"):
        asyncio.run(checker.acheck(r"\sqrt{2}", r"\sqrt{3}"))


def test_many_answers_at_once_from_several_loops(checker):
    async def grade():
        pairs = [(rf"\sqrt{{{n * n * 2}}}", rf"{n + n % 2}\sqrt{{2}}") for n in range(1, 9)]
        return [v.correct for v in await asyncio.gather(*(checker.acheck(*p) for p in pairs))]

    expected = [n % 2 == 0 for n in range(1, 9)]
    assert asyncio.run(grade()) == expected
    assert asyncio.run(grade()) == expected


def test_a_closed_checker_starts_again_and_the_process_shares_one():
    checker = AnswerChecker()
    checker.close()
    assert checker.check("2x", "x+x").correct
    checker.close()
    assert shared_checker() is shared_checker()


ATTACKS = {
    "a million digits": "7" * 10**6,
    "a fraction of a million digits": "1/" + "7" * 10**6,
    "digits": "7" * 3999,
    "braces": "{" * 10**5 + "}" * 10**5,
    "parentheses": "(" * 10**5 + "1" + ")" * 10**5,
    "short parentheses": "(" * 1900 + "1" + ")" * 1900,
    "nested tuples": "(1," * 900 + "1" + ")" * 900,
    "nested roots": r"\sqrt{" * 500 + "2" + "}" * 500,
    "tower": "9^{9^{9^9}}",
    "factorials": "9!!!!",
    "factorial": "99999999!",
    "power": "3^{1000000000}",
    "exponent": "1e999999999",
    "product": r"\prod_{k=1}^{10^9} k",
    "integral": r"\int_0^{\infty} \frac{\sin(x^3)}{\log(x+2)} dx",
    "polynomial": "(x+y+z+1)^{500}",
    "import": "__import__('os').system('exit 1')",
    "end of the literal": "''')]); import os; os._exit(0)#",
    "verdict": "\n\nTrue\nnonce 0 True\n",
    "thousands": "1" + ",111" * 990,
    "spaces": "1 " * 1990,
    "minuses": "-" * 3990,
    "bars": "|" * 3000,
    "primes": "x" + "'" * 3000,
    "units": "3 apples " * 440,
    "comparisons": "x<" * 1900,
    "signs": r"1\pm2," * 600,
    "elements": "1," * 1990 + "2",
    "equations": "x=1," * 900,
    "conjunctions": "and " * 990,
    "subscripts": "_{a}" * 900 + "=1",
    "names": r"\alpha" * 600 + "=1",
    "cells": r"\begin{pmatrix}" + "1&" * 1900 + r"\end{pmatrix}",
    "surrogate": "\ud800 1/3",
    "NUL": "1\0/3",
    "ligatures that expand": "\ufdfa" * 3990,
    "accents": "e" + "\u0301" * 3900,
}


@pytest.mark.parametrize("name", ATTACKS)
def test_no_answer_hangs_or_hurts_the_grader(checker, name):
    started, host = time.perf_counter(), time.process_time()
    verdict = checker.check(ATTACKS[name], ["x^2+1", r"\frac12+\sqrt2"])
    assert not verdict.correct
    # The limit is on CPU time; on a busy machine waiting for a core comes on top.
    assert time.process_time() - host < 0.5
    assert time.perf_counter() - started < 5 * LIMIT


@pytest.mark.parametrize("name", ATTACKS)
def test_extraction_takes_linear_time(name):
    started = time.process_time()
    extract_answer(ATTACKS[name])
    extract_answer(r"\boxed{" * 1000 + ATTACKS[name] + " answer is " * 1000)
    assert time.process_time() - started < LIMIT


def test_the_checker_is_healthy_after_a_timeout(checker):
    assert checker.check("9^{9^{9^9}}", "7^x").how == "timeout"
    assert checker.check(r"\sqrt{18}", r"3\sqrt{2}") == Verdict(True, "verified")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\left\{1, \{2\}\right\}}", r"\left\{1, \{2\}\right\}"),
        (r"\boxed{a_{1}^{2}} and then \boxed{cut off", "a_{1}^{2}"),
        (r"{ stray \boxed{5}", "5"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed 8", "8"),
        (r"\boxed{}", None),
        ("steps\n#### 1,234", "1,234"),
        ("Answer: 1\nwait\n**Answer:** 2", "2"),
        ("The final answer is $x=3$.", "$x=3$"),
        ("The answer is therefore $x=3$.", "x=3"),
        ("The answer is 3.5. It is final.", "3.5"),
        ("Answer:\n\n42", "42"),
        ("I think that it must be 17", "17"),
        ("First 3 things, then there are 4/5 left", "4/5"),
        ("x = 2 or x = 3", "x = 2 or x = 3"),
        ("Paris", "Paris"),
        ("It must surely be in Paris", "It must surely be in Paris"),
        ("", None),
        ("many words without any number " * 20, None),
    ],
)
def test_extract_answer(text, expected):
    assert extract_answer(text) == expected


def _spellings(value: Fraction) -> list[str]:
    """How a writer may put the number down."""
    sign, top, bottom = "-" if value < 0 else "", abs(value.numerator), value.denominator
    ways = [f"{sign}{top}/{bottom}", rf"{sign}\frac{{{top}}}{{{bottom}}}"]
    ways += [rf"\dfrac{{{sign}{top}}}{{{bottom}}}", f"$ {sign}{top} / {bottom} $."]
    if bottom == 1:
        ways += [f"{sign}{top:,}", f"{sign}00{top}", f"{sign}{top}.0", rf"\boxed{{{sign}{top}}}"]
        ways += [f"x = {sign}{top}", f"({sign}{top})", rf"{sign}{top}\text{{ cm}}"]
    elif top > bottom:
        ways.append(rf"{sign}{top // bottom}\frac{{{top % bottom}}}{{{bottom}}}")
    if 10**6 % bottom == 0:
        ways += [f"{sign}{float(abs(value)):.6f}", f"{sign}{float(abs(100 * value)):.4f}\\%"]
    return ways


NUMBERS = st.fractions(min_value=-9999, max_value=9999, max_denominator=64)
FAST = AnswerChecker()  # never needs its sandbox for numbers


@given(NUMBERS, st.data())
def test_a_number_is_equal_in_all_its_spellings(value, data):
    a, b = (data.draw(st.sampled_from(_spellings(value))) for _ in range(2))
    assert FAST.check(a, b).correct
    assert FAST._sandbox is None


@given(NUMBERS, NUMBERS, st.data())
def test_different_numbers_are_different_in_all_spellings(x, y, data):
    a, b = (data.draw(st.sampled_from(_spellings(v)[:4])) for v in (x, y))
    assert FAST.check(a, b).correct is (x == y)


MATHS = st.text(string.printable, max_size=60) | st.text(max_size=60)
PIECES = (*"12xyA,;()[]{}=<>+-*/^_%$&|.: °", "or", "and", "cm", r"\{", r"\}", r"\text{", r"\pm ")
PIECES += (r"\frac", r"\sqrt", r"\cup", r"\infty", r"\le ")
MATHS |= st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@given(MATHS)
def test_every_text_is_its_own_answer(text):
    assert FAST.check(text, text).correct
    for kind in answer.KINDS:
        assert FAST.check(text, text, kind=kind).correct


@given(MATHS, MATHS)
@settings(max_examples=300)
def test_no_pair_of_texts_raises_before_the_sandbox(a, b):
    for kind in answer.KINDS:
        FAST._quick(a, b, kind)
    extract_answer(a)


@given(MATHS, MATHS)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_pair_of_texts_raises_in_the_sandbox(checker, a, b):
    assert checker.check(a, b).how in {
        *("exact", "normalised", "verified", "different", "unparsable", "timeout", "missing")
    }
