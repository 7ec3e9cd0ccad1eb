"""Checking answers: the pairs that graders get wrong, attacks, extraction, and properties."""

from __future__ import annotations

import pytest

from rllib_gtpo.rewards.answer import AnswerChecker
from tests.rewards.answer_pairs import DIFFERENT, EQUAL


@pytest.fixture(scope="module")
def checker():
    checker = AnswerChecker()
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
