"""Statistics of differences paired by seed: intervals, exact p values, Holm's correction, and the verdict by rule."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pandas import Series
from scipy import stats

LEVEL = 0.95
EXACT = 2**16  # sign flips are enumerated up to here (16 seeds), drawn at random above


@dataclass(frozen=True)
class Paired:
    """The statistics of one contrast.

    `interval` is the t interval of the mean at 95 %; it and the p values of the t test and of the sign flips need two
    seeds. The interval is None and `p_t` is nan too if all seeds have the same difference: on a few hundred test
    samples equal counts occur by chance, and an interval of width 0 would claim certainty.
    """

    differences: Series  # by seed, one for each seed that has both sides
    mean: float = math.nan
    sd: float = math.nan
    interval: tuple[float, float] | None = None
    p_t: float = math.nan
    p_signs: float = math.nan


def paired(differences: Series) -> Paired:
    """The statistics of a contrast from its differences by seed.

    The interval is mean ± t(0.975, n - 1)·sd/√n, exact for normal differences; `p_t` is the two-sided p of the same
    paired t test.
    """
    d, mean = differences, float(differences.mean())
    if len(d) < 2:
        return Paired(d, mean)
    if np.ptp(d) <= 1e-9 * d.abs().max():  # 0.9 - 0.8 and 0.4 - 0.3 are not the same float
        return Paired(d, mean, sd=0.0, p_signs=p_signs(d))
    test = stats.ttest_1samp(d, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return Paired(d, mean, float(d.std()), (float(low), float(high)), float(test.pvalue), p_signs(d))


def p_signs(d: Series) -> float:
    """Two-sided p of the sign-flip test: the share of all 2^n sign patterns whose mean is at least as far from 0.

    It assumes no normality, only that without an effect a difference is as likely as its negative. Its smallest value
    is 2/2^n. Above 16 seeds, 2^16 patterns are drawn at random.
    """
    rng = np.random.default_rng(0)
    return float(stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=EXACT, rng=rng).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values (Holm 1979), in the order given; nan stays nan.

    A declared contrast without a p yet counts as 1, so that the correction does not grow while a study runs. The i-th
    smallest of m becomes max over j <= i of min(1, (m - j + 1)·p_j): the chance of any false finding among all m stays
    below the level.
    """
    p = Series(values, dtype=float).sort_values()  # nan last, as the 1 that it counts as
    return (p * np.arange(len(p), 0, -1)).cummax().clip(upper=1).sort_index().tolist()


class Effect(NamedTuple):
    """A difference of a metric, as a column of a study's table, with its statistics and its `verdict`."""

    name: str
    column: str
    pair: Paired
    tone: int
    words: str


NO_INTERVAL = (  # by the number of seeds
    "no pair of points yet",
    "one seed: no interval, nothing can be said",
    "all seeds the same: no interval, nothing can be said",
)


def verdict(pair: Paired, adjusted: float, better: int = 0) -> tuple[int, str]:
    """The verdict by rule: whether the t interval excludes 0, and whether Holm's p of the t test is below 0.05.

    Returns its tone, the sign of the difference or 0 if it is not significant, and its words. `better` is 1 if a higher
    metric is better, -1 if a lower one is, 0 if neither is.
    """
    if pair.interval is None:
        return 0, NO_INTERVAL[min(len(pair.differences), 2)]
    low, high = pair.interval
    if low <= 0 <= high:
        return 0, "not distinguished from 0"
    sign = 1 if low > 0 else -1
    side = "" if not better else " (better)" if sign == better else " (worse)"
    words = ("positive" if sign > 0 else "negative") + side
    if adjusted >= 1 - LEVEL:  # no colour: it is not a finding of the study
        return 0, f"{words}, not after correction"
    return sign, words
