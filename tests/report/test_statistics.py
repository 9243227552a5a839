"""What the report says of paired differences, against values by hand and by other roads."""

import itertools
import math

import numpy as np
import pytest
from pandas import Series
from scipy import stats

from kd.report.statistics import holm, p_signs, paired, verdict

FIVE = Series([-4.0, -3.0, -5.0, -4.5, -1.0])


def test_the_t_interval_is_the_textbooks():
    # mean -3.5; sum of squares .25 + .25 + 2.25 + 1 + 6.25 = 10, so sd = sqrt(10 / 4); t(.975, 4) = 2.776445 in tables
    half = 2.776445 * math.sqrt(2.5) / math.sqrt(5)
    five = paired(FIVE)
    assert five.interval == pytest.approx((-3.5 - half, -3.5 + half), abs=1e-5)
    assert (five.mean, five.sd) == (pytest.approx(-3.5), pytest.approx(math.sqrt(2.5)))
    assert five.p_t == pytest.approx(stats.ttest_rel(FIVE + 7, Series([7.0] * 5)).pvalue)


@pytest.mark.parametrize("d", [FIVE, Series([1.0, -1.0, 2.0, -2.0, 0.5])])
def test_the_sign_flip_p_counts_all_thirty_two_patterns(d):
    means = [abs(np.mean(d * np.array(signs))) for signs in itertools.product((1, -1), repeat=5)]
    assert len(means) == 32
    assert p_signs(d) == pytest.approx(sum(mean >= abs(d.mean()) - 1e-12 for mean in means) / 32)


def test_holm_by_hand():
    # .01 x 4 = .04; .02 x 3 = .06; .03 x 2 = .06; .04 x 1 = .04, which may not fall below the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    # a contrast that has not run still counts
    assert holm([math.nan, 0.01, math.nan]) == pytest.approx([math.nan, 0.03, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("differences", "better", "tone", "words"),
    [
        (FIVE, 1, -1, "negative (worse)"),
        (-FIVE, 1, 1, "positive (better)"),
        (FIVE, -1, -1, "negative (better)"),
        (FIVE, 0, -1, "negative"),
        ([0.1, 1.0, 2.0], 1, 0, "not distinguished from 0"),
        # the same but for the floats' last place
        ([0.9 - 0.8, 0.4 - 0.3], 1, 0, "all seeds the same: no interval, nothing can be said"),
        ([3.0], 1, 0, "one seed: no interval, nothing can be said"),
        ([], 1, 0, "no pair of points yet"),
    ],
)
def test_words_by_rule(differences, better, tone, words):
    pair = paired(Series(differences, dtype=float))
    assert verdict(pair, pair.p_t, better) == (tone, words)


def test_a_finding_that_correction_takes_away_says_so():
    pair = paired(FIVE)
    assert pair.p_t < 0.05 / 2 < 0.05 < 20 * pair.p_t
    taken, kept = verdict(pair, 20 * pair.p_t, 1), verdict(pair, 2 * pair.p_t, 1)
    assert taken == (0, "negative (worse), not after correction")  # and is not coloured as one that holds
    assert kept == (-1, "negative (worse)")


@pytest.mark.parametrize("d", [[-0.5] * 5, [0.0] * 5, [0.9 - 0.8, 0.4 - 0.3, 0.6 - 0.5]])
def test_seeds_that_are_all_the_same_are_no_certainty(d):
    pair = paired(Series(d))
    assert pair.mean == pytest.approx(np.mean(d))
    assert pair.interval is None
    assert math.isnan(pair.p_t)
    assert pair.p_signs == (1 if not any(d) else 2 / 2 ** len(d))  # which needs no spread
