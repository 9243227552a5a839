"""What the report says of paired differences, against values by hand and by other roads."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kd.report.statistics import (
    Verdict,
    bootstrap_coverage,
    bootstrap_interval,
    holm,
    p_signs,
    paired,
    verdict,
)

FIVE = np.array([-4.0, -3.0, -5.0, -4.5, -1.0])


def test_the_t_interval_is_the_textbooks():
    # mean -3.5; sum of squares .25 + .25 + 2.25 + 1 + 6.25 = 10, so sd = sqrt(10 / 4); t(.975, 4) = 2.776445 in tables
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    assert paired(FIVE).t_interval == pytest.approx((-3.5 - half, -3.5 + half), abs=1e-5)
    found = paired(FIVE)
    assert (found.n, found.mean, found.sd) == (5, pytest.approx(-3.5), pytest.approx(math.sqrt(2.5)))


def test_the_p_of_the_t_test_is_that_of_two_paired_columns():
    a, b = np.array([0.1, 0.4, 0.2, 0.9, 0.5]), np.array([0.3, 0.2, 0.1, 0.4, 0.1])
    assert paired(a - b).p_t == pytest.approx(stats.ttest_rel(a, b).pvalue)


@pytest.mark.parametrize("d", [FIVE, np.array([0.1, 0.3, -0.05, 0.2, 0.4]), np.array([1.0, -1.0, 2.0, -2.0, 0.5])])
def test_the_sign_flip_p_counts_all_thirty_two_patterns(d):
    means = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=5)]
    assert len(means) == 32
    assert p_signs(d) == pytest.approx(sum(mean >= abs(d.mean()) - 1e-12 for mean in means) / 32)


def test_the_bootstrap_interval_has_the_quantiles_of_all_resamples():
    d = np.array([0.0, 1.0, 2.0, 4.0])
    means = [np.mean(drawn) for drawn in itertools.product(d, repeat=4)]  # all 256
    low, high = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(d) == pytest.approx((low, high), abs=0.15)
    assert bootstrap_interval(d) == bootstrap_interval(d)


def test_holm_by_hand():
    # .01 x 4 = .04; .02 x 3 = .06; .03 x 2 = .06; .04 x 1 = .04, which may not fall below the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_contrast_that_has_not_run_still_counts():
    assert holm([0.01, None, None]) == [pytest.approx(0.03), None, None]


@pytest.mark.parametrize(
    ("differences", "better", "tone", "words"),
    [
        (FIVE, 1, -1, "negative (worse)"),
        (-FIVE, 1, 1, "positive (better)"),
        (FIVE, -1, -1, "negative (better)"),
        (FIVE, 0, -1, "negative"),
        ([-1.0, 1.0, 0.5, -0.4], 1, 0, "not distinguished from 0"),
        ([0.1, 1.0, 2.0], 1, 0, "not distinguished from 0"),  # though every resample's mean is above 0
        ([0.0, 0.0, 0.0], 1, 0, "all seeds the same: no interval, nothing can be said"),
        # the same but for the floats' last place
        ([0.9 - 0.8, 0.4 - 0.3], 1, 0, "all seeds the same: no interval, nothing can be said"),
        ([3.0], 1, 0, "one seed: no interval, nothing can be said"),
        ([], 1, 0, "no pair of points yet"),
    ],
)
def test_words_by_rule(differences, better, tone, words):
    found = paired(differences)
    assert verdict(found, found.p_t, better) == Verdict(tone, words)


def test_a_finding_that_correction_takes_away_says_so():
    found = paired(FIVE)
    assert found.p_t is not None
    assert found.p_t < 0.05 / 2 < 0.05 < 20 * found.p_t
    taken, kept = verdict(found, 20 * found.p_t, 1), verdict(found, 2 * found.p_t, 1)
    assert taken.words == "negative (worse), not after correction"
    assert (kept.words, kept.tone, taken.tone) == ("negative (worse)", -1, 0)  # and is not coloured as one that holds


@pytest.mark.parametrize("d", [[0.5] * 5, [-0.5] * 5, [0.0] * 5, [0.9 - 0.8, 0.4 - 0.3, 0.6 - 0.5]])
def test_seeds_that_are_all_the_same_are_no_certainty(d):
    found = paired(d)
    assert found.mean == pytest.approx(np.mean(d))
    assert (found.t_interval, found.bootstrap_interval, found.p_t) == (None, None, None)
    assert found.p_signs == (1 if not any(d) else 2 / 2 ** len(d))  # which needs no spread


def test_the_bootstrap_is_too_short_with_five_seeds_and_right_with_a_hundred():
    # By normal theory the interval is about 1.96·sqrt((n - 1) / n) standard errors to each side, so with n = 5 it holds
    # the mean as often as |t| with 4 degrees of freedom stays below that.
    reach = 1.96 * math.sqrt(4 / 5)
    assert bootstrap_coverage(5) == pytest.approx(1 - 2 * stats.t.sf(reach, 4), abs=0.03)
    assert bootstrap_coverage(100) == pytest.approx(0.95, abs=0.015)
