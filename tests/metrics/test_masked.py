"""A class masked by -inf: the metric of the logits without it, and inf or nan where the formula gives them."""

import math

import pytest
import torch

from kd.metrics import (
    METRICS,
    agreement,
    best_bias,
    class_similarity_correlation,
    estimate_smoothing,
    mce,
    nll,
    normalised_max_logit,
    nt_cosine,
    nt_kl,
    post_hoc_temperature,
    predictive_kl,
    recall_with_bias,
    reliability_bins,
)

INF = math.inf
NAMES = [name for name in METRICS if name not in ("transfer_efficiency", "mutual_information")]
OF_LOGITS = ("logits", "teacher", "reference", "scaled")


def draw(*shape, seed=0):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evidence():
    logits, other, targets = draw(60, 5), draw(60, 5, seed=1), torch.arange(60) % 5
    logits[torch.arange(60), targets] += 3
    known = {"logits": logits, "teacher": other, "reference": other + logits, "scaled": logits / 2}
    return known | {"features": draw(60, 3), "targets": targets, "omitted": 1, "bias": 0.7}


def with_class(logits, value):
    """The logits with one more class, which takes index 2."""
    return torch.cat([logits[:, :2], torch.full_like(logits[:, :1], value), logits[:, 2:]], dim=1)


def masked(known, value=-INF):
    wider = {name: with_class(known[name], value) for name in OF_LOGITS}
    return known | wider | {"targets": known["targets"] + (known["targets"] > 1)}


def called(metric, known):
    return float(metric.function(*[known[need] for need in metric.needs]))


@pytest.mark.parametrize("name", NAMES)
def test_a_masked_class_does_not_count(name):
    found, without = (called(METRICS[name], known) for known in (masked(evidence()), evidence()))
    counted = {"classwise_ece": 5 / 6, "gamma": 6 / 5 * 4 / 5}.get(name, 1)  # in the 1/K and K/(K-1) of the formula
    assert found == pytest.approx(without * counted, rel=1e-12, abs=1e-15)


def test_nor_for_what_is_no_number():
    z, y = evidence()["logits"], evidence()["targets"]
    wide, moved = masked(evidence())["logits"], masked(evidence())["targets"]
    for function in (mce, reliability_bins, estimate_smoothing):
        assert function(wide, moved) == function(z, y)
    assert best_bias(wide, moved, 1) == best_bias(z, y, 1)


SHAPED = ("nt_cosine", "aurc_normalised_logits", "smoothing_estimate", "smoothing_low", "smoothing_high")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHAPED])
def test_a_class_that_some_samples_mask_is_one_of_a_large_negative_logit(name):
    """Not for the five that see the size of a logit."""
    known = evidence()
    some = (torch.arange(60) % 7 < 3) & (known["targets"] != 3)
    hidden = some[:, None] & (torch.arange(5) == 3)
    far, gone = (known | {key: known[key].masked_fill(hidden, value) for key in OF_LOGITS} for value in (-1e13, -INF))
    assert called(METRICS[name], gone) == pytest.approx(called(METRICS[name], far), rel=1e-12)


def test_a_direction_is_that_of_the_other_classes():
    z, r, y = evidence()["logits"], evidence()["reference"], evidence()["targets"]
    kept = [[k for k in range(5) if k != (i + 2) % 5] for i in y.tolist()]
    hidden = torch.arange(5) == (y[:, None] + 2) % 5
    place = torch.tensor([row.index(i) for row, i in zip(kept, y.tolist(), strict=True)])
    fewer, reference = (x.gather(1, torch.tensor(kept)) for x in (z, r))
    z, r = z.masked_fill(hidden, -INF), r.masked_fill(hidden, -INF)
    assert nt_cosine(z, r, y).item() == pytest.approx(nt_cosine(fewer, reference, place).item(), rel=1e-12)
    torch.testing.assert_close(normalised_max_logit(z), normalised_max_logit(fewer))


@pytest.mark.parametrize("value", [None, -1e13, torch.finfo(torch.float64).min, -INF])
def test_the_temperature_of_three_samples_by_hand(value):
    """The likelihood of two right and one wrong gap of 2 is largest where softmax gives 2/3 and 1/3: e^(2/T) = 2."""
    logits = torch.tensor([[2.0, 0], [0, 2], [2, 0]], dtype=torch.float64)
    if value is not None:
        logits = with_class(logits, value)
    assert post_hoc_temperature(logits, torch.zeros(3, dtype=torch.int64)).item() == pytest.approx(2 / math.log(2))


def test_what_the_formula_gives_where_one_of_two_masks():
    z, r, y = draw(4, 4), draw(4, 4, seed=1), torch.tensor([0, 1, 0, 1])
    hidden = with_class(z[:, :3], -INF)
    assert nll(hidden, y + 1).item() == post_hoc_temperature(hidden, y + 1).item() == INF  # labels of the masked class
    assert predictive_kl(r, hidden).item() == nt_kl(hidden, r, y).item() == INF
    p, q = hidden.softmax(1), r.log_softmax(1)
    assert predictive_kl(hidden, r).item() == pytest.approx((p * (p.log() - q))[:, [0, 1, 3]].sum(1).mean().item())
    assert math.isnan(nt_cosine(hidden, r, y).item())
    far = with_class(r[:, :3], -1e4)  # its probability is 0 too
    assert nt_kl(hidden, far, y).item() == pytest.approx(nt_kl(z[:, :3], r[:, :3], y).item(), rel=1e-12)
    alone = torch.full_like(z, -INF).scatter(1, y[:, None], 0.0)
    assert math.isnan(nt_kl(alone, r, y).item())
    assert math.isnan(nt_kl(r, alone, y).item())
    with pytest.raises(ValueError, match=r"^logits have 2 classes that are not masked: must be 3 or more"):
        class_similarity_correlation(with_class(z[:, :2], -INF), with_class(r[:, :2], -INF), y)


def test_an_omitted_class_that_is_masked_is_not_predicted():
    logits, targets = evidence()["logits"], evidence()["targets"]
    logits[:30, 1] = -INF
    logits[30, [0, 2, 3, 4]] = -INF  # always predicted
    assert best_bias(logits, targets, 1) == best_bias(logits[31:], targets[31:], 1)
    assert recall_with_bias(logits, targets, 1, 1e9).item() == 0.5
    assert best_bias(logits[:30], targets[:30], 1) == 0


def test_smoothing_is_doubted_where_most_samples_mask_a_class():
    z = 5 * torch.eye(4, dtype=torch.float64)[torch.arange(200) % 4]
    z[:150].masked_fill_(torch.arange(4) == (torch.arange(150)[:, None] + 1) % 4, -INF)
    found = estimate_smoothing(z, torch.arange(200) % 4)
    assert found.label_smoothing < 1e-300
    assert any("logits differ by inf" in doubt for doubt in found.doubts)


def test_masked_classes_share_the_last_ranks():
    a = torch.tensor([[3.0, 2, -INF, -INF]])
    assert agreement(a, torch.tensor([[3.0, -INF, 2, -INF]]), 2).item() == 0.5
    with pytest.raises(ValueError, match=r"^logits has 1 rows with nan, inf or nothing but -inf"):
        agreement(torch.full((1, 4), -INF), a)
