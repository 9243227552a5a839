"""What differences that are paired by seed say: intervals, exact p values, Holm's correction, and words by rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9999
EXACT = 2**16  # sign flips are enumerated up to here (16 seeds), drawn at random above
Interval = tuple[float, float]


@dataclass(frozen=True)
class Paired:
    """The differences of one contrast, one for each seed that has both sides.

    `t_interval` and `bootstrap_interval` are for the mean at 95 %; they and the p values are None below two seeds.
    Where all seeds have the same difference, intervals and `p_t` are None too: a few hundred test samples give equal
    counts by chance, and an interval of no width would be certain of them.
    """

    differences: tuple[float, ...]
    mean: float | None
    sd: float | None
    t_interval: Interval | None
    bootstrap_interval: Interval | None
    p_t: float | None
    p_signs: float | None

    @property
    def n(self) -> int:
        """The number of seeds."""
        return len(self.differences)


def paired(differences: Sequence[float]) -> Paired:
    """Everything that is printed of a contrast whose differences by seed are given."""
    d = np.asarray(differences, dtype=float)
    if len(d) < 2:
        return Paired(tuple(d.tolist()), d.item() if len(d) else None, None, None, None, None, None)
    mean, sd = d.mean().item(), d.std(ddof=1).item()
    if np.ptp(d) <= 1e-9 * np.abs(d).max():  # 0.9 - 0.8 and 0.4 - 0.3 are not the same float
        return Paired(tuple(d.tolist()), mean, 0.0, None, None, None, p_signs(d))
    return Paired(tuple(d.tolist()), mean, sd, t_interval(d), bootstrap_interval(d), p_t(d), p_signs(d))


def t_interval(d: np.ndarray) -> Interval:
    """mean ± t(0.975, n - 1)·sd/√n, which is exact where the differences are normal."""
    half = stats.t.ppf((1 + LEVEL) / 2, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return (d.mean() - half).item(), (d.mean() + half).item()


def bootstrap_interval(d: np.ndarray) -> Interval:
    """Percentile bootstrap of the mean difference (Efron 1979): seeds drawn with their pair, always the same."""
    made = stats.bootstrap(
        (d,), np.mean, confidence_level=LEVEL, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return float(made.low), float(made.high)


def p_t(d: np.ndarray) -> float:
    """Two-sided p of the paired t test; of differences that are not all equal."""
    return float(stats.ttest_1samp(d, 0.0).pvalue)


def p_signs(d: np.ndarray) -> float:
    """Two-sided p of the sign-flip test: the share of all 2^n sign patterns whose mean is at least as far from 0.

    It needs no normality, only that without an effect a difference is as likely as its negative. Its smallest value is
    2/2^n. Above 16 seeds the patterns are a random 2^16.
    """
    made = stats.permutation_test(
        (d,), np.mean, permutation_type="samples", n_resamples=EXACT, rng=np.random.default_rng(0)
    )
    return float(made.pvalue)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down adjusted p values (Holm 1979), in the order given; None stays None.

    What was declared but has no p yet counts as 1, so that a correction does not grow while a study runs. The i-th
    smallest of m becomes max over j <= i of min(1, (m - j + 1)·p_j): the chance of any false finding among all m stays
    below the level.
    """
    order = sorted((p, i) for i, p in enumerate(values) if p is not None)  # the others come last
    adjusted: list[float | None] = [None] * len(values)
    highest = 0.0
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * p))
        adjusted[i] = highest
    return adjusted


@dataclass(frozen=True)
class Verdict:
    """What a contrast shows: `sign` is -1, 0 or 1, None where there is no interval.

    `holds` is whether a sign stays after correction; one that does not is drawn as if there were none.
    """

    sign: int | None
    words: str
    holds: bool = True

    @property
    def tone(self) -> int:
        """The sign that it is coloured by."""
        return self.sign if self.sign and self.holds else 0


def verdict(found: Paired, adjusted: float | None, better: int = 0) -> Verdict:
    """Words by rule: whether the t interval excludes 0, and whether Holm's p of the t test is below .05.

    `better` is 1 where a higher metric is better, -1 where a lower one is, 0 where neither can be said.
    """
    if found.t_interval is None:
        why = ("no pair of points yet", "one seed: no interval, nothing can be said")
        return Verdict(None, (*why, "all seeds the same: no interval, nothing can be said")[min(found.n, 2)])
    low, high = found.t_interval
    if low <= 0 <= high:
        return Verdict(0, "not distinguished from 0")
    sign = 1 if low > 0 else -1
    side = "" if not better else " (better)" if sign == better else " (worse)"
    weak = adjusted is None or adjusted >= 1 - LEVEL
    words = ("positive" if sign > 0 else "negative") + side
    return Verdict(sign, f"{words}, not after correction" if weak else words, holds=not weak)


@cache
def bootstrap_coverage(n: int, trials: int = 2000, resamples: int = 2000) -> float:
    """How often the percentile bootstrap interval of n normal differences holds their true mean; it should be 0.95.

    Simulated, always with the same seed: the standard error is about 0.008 for 2000 trials.
    """
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(n, trials))
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples) / n
    low, high = np.quantile(weights @ samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return float(np.mean((low <= 0) & (high >= 0)))
