"""Intervals and paired tests, against numbers that a person can compute."""

from __future__ import annotations

import operator
from itertools import product
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rllib_gtpo import intervals
from rllib_gtpo.intervals import difference, paired_bootstrap, relative_gain, sign_flip_p


class TestPairedBootstrap:
    def test_a_constant_gap_has_no_width(self):
        gap = difference([[0.5, 0.7, 0.9]], [[0.4, 0.6, 0.8]])
        assert (gap.estimate, gap.low, gap.high) == pytest.approx((0.1, 0.1, 0.1))
        assert gap.clears_zero

    def test_pairing_removes_what_seeds_share(self):
        """Unpaired, these spread by 0.8; paired, by nothing."""
        assert difference([[0.1, 0.9]], [[0.0, 0.8]]).low == pytest.approx(0.1)

    def test_two_pairs_by_hand(self):
        """Resampled mean gaps of {0, 0.2} are 0, 0.1, 0.1 and 0.2."""
        gap = difference([[0.0, 0.2]], [[0.0, 0.0]])
        assert (gap.estimate, gap.low, gap.high) == pytest.approx((0.1, 0.0, 0.2))
        assert not gap.clears_zero

    def test_tasks_weigh_the_same_whatever_their_seeds(self):
        gap = difference([[1.0, 1.0], [0.0, 0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0, 0.0]])
        assert gap.estimate == pytest.approx(0.5)

    def test_relative_gain_is_of_the_means(self):
        gain = relative_gain([[0.6, 0.6]], [[0.4, 0.6]])
        assert gain.estimate == pytest.approx(0.2)
        assert (gain.low, gain.high) == pytest.approx((0.0, 0.5))

    def test_one_seed_has_no_interval(self):
        with pytest.raises(ValueError, match="two seeds"):
            difference([[1.0]], [[0.0]])

    def test_coverage_is_near_its_level(self):
        """With 20 pairs; with five it is lower, which is why p is shown beside it."""
        rng = np.random.default_rng(0)
        hits = 0
        for _ in range(200):
            ours, theirs = rng.normal(0.1, 1, 20), rng.normal(0, 1, 20)
            gap = paired_bootstrap([ours], [theirs], lambda a, b: a - b, resamples=400)
            hits += gap.low <= 0.1 <= gap.high
        assert 0.87 <= hits / 200 <= 0.99


counts = st.lists(st.integers(-4, 4), min_size=1, max_size=9)


def by_enumeration(gaps):
    """Over all flips, as exact numbers."""
    flips = product((-1, 1), repeat=len(gaps))
    sums = [abs(sum(map(operator.mul, gaps, signs))) for signs in flips]
    return sum(each >= abs(sum(gaps)) for each in sums) / len(sums)


class TestSignFlips:
    @pytest.mark.parametrize(
        ("gaps", "p"), [([1, 1, 1], 0.25), ([1, 1, 1, 1, 1], 0.0625), ([1, -1], 1.0), ([3, -1], 1)]
    )
    def test_sign_flips_by_hand(self, gaps, p):
        assert sign_flip_p(gaps) == pytest.approx(p)

    @pytest.mark.parametrize(("better", "worse"), [(30, 0), (20, 10), (15, 15), (40, 21)])
    def test_of_single_samples_it_is_the_exact_test_of_mcnemar(self, better, worse):
        """Twice the smaller tail of the binomial distribution over the tasks that differ."""
        n = better + worse
        tail = sum(comb(n, i) for i in range(min(better, worse) + 1)) / 2**n
        gaps = [1.0] * better + [-1.0] * worse + [0.0] * 500
        assert sign_flip_p(gaps) == pytest.approx(min(1.0, 2 * tail))

    @given(counts, st.sampled_from([1, 3, 4, 8]))
    def test_many_pairs_are_exact(self, gaps, samples):
        """The distribution of the sum, which takes the place of enumeration where pairs are many,
        is the enumerated one."""
        exact = by_enumeration(gaps)
        assert sign_flip_p([gap / samples for gap in gaps]) == pytest.approx(exact)
        some = [gap for gap in gaps if gap]
        assert intervals._exact_p(some or [0]) == pytest.approx(exact)

    @given(counts)
    def test_it_does_not_matter_which_one_is_first_nor_the_order(self, gaps):
        p = sign_flip_p(gaps)
        assert 0 < p <= 1
        assert sign_flip_p([-gap for gap in reversed(gaps)]) == pytest.approx(p)
        assert sign_flip_p([*gaps, 0, 0]) == pytest.approx(p)

    @given(st.lists(st.integers(0, 4), min_size=3, max_size=7), st.sampled_from([0.05, 0.2, 0.5]))
    @settings(max_examples=40)
    def test_without_a_difference_it_is_small_as_rarely_as_it_says(self, sizes, level):
        """Over all equally likely signs: the share of p at or below a level is at most that."""
        signs = product((-1, 1), repeat=len(sizes))
        small = [sign_flip_p(np.multiply(sizes, each)) <= level + 1e-12 for each in signs]
        assert sum(small) / len(small) <= level + 1e-12

    def test_values_without_a_unit_are_sampled(self):
        """Normal values: near the exact test of the same ones rounded, and never 0."""
        rng = np.random.default_rng(1)
        gaps = rng.normal(0.3, 1, 40)
        assert intervals._in_units(gaps) is None
        exact = sign_flip_p(np.round(gaps, 2))
        assert sign_flip_p(gaps) == pytest.approx(exact, abs=0.005)
        assert sign_flip_p(np.abs(gaps)) == pytest.approx(1 / 100_001)
