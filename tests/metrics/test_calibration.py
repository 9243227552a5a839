"""Calibration errors, the post-hoc temperature and selective prediction against golden, library and hand values."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from kd.metrics import (
    aurc,
    aurc_max_probability,
    aurc_normalised_logits,
    classwise_ece,
    ece,
    equal_mass_ece,
    mce,
    nll,
    normalised_max_logit,
    post_hoc_temperature,
    reliability_bins,
)

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "authors_metrics.json").read_text())


def case(key, where="calibration"):
    (found,) = [c for c in GOLDEN["cases"] if c["key"] == key and c["inputs"] == where]
    return found["expected"]["value"]


def golden_inputs():
    data = GOLDEN["inputs"]["calibration"]
    return torch.tensor(data["z"], dtype=torch.float64), torch.tensor(data["y"])


def draw(n=300, k=7, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, k, generator=generator, dtype=torch.float64)
    keep = torch.rand(n, generator=generator) < 0.6
    return logits, torch.where(keep, logits.argmax(1), torch.randint(k, (n,), generator=generator))


# ---- calibration errors


def test_the_authors_errors():
    logits, targets = golden_inputs()
    assert ece(logits, targets).item() == pytest.approx(case("ece"), abs=1e-9)  # given to ten digits
    assert ece(logits, targets).item() == pytest.approx(case("ece_dict"), abs=1e-5)
    assert classwise_ece(logits, targets).item() == pytest.approx(case("cwece"), rel=1e-9)


def adaptive(confidence, right, bins):
    """The authors' adaptive error, by NumPy: edges at interpolated ranks, bins (lo, hi]."""
    edges = np.interp(np.linspace(0, len(right), bins + 1), np.arange(len(right)), np.sort(confidence))
    inside = [(confidence > lo) & (confidence <= hi) for lo, hi in itertools.pairwise(edges)]
    return sum(abs((right[each] - confidence[each]).sum()) for each in inside) / len(right)


@pytest.mark.parametrize("bins", [1, 7, 15, 41, 200, 333])
@pytest.mark.parametrize("decimals", [0, 16])  # with 0 most confidences are shared, some up to rounding
def test_equal_masses_and_the_authors_edges(bins, decimals):
    logits, targets = golden_inputs()
    logits = logits.round(decimals=decimals)
    p = logits.softmax(1).numpy()
    right, confidence = (p.argmax(1) == targets.numpy()).astype(float), p.max(1)
    order = confidence.argsort(kind="stable")
    masses = np.abs(np.bincount(np.arange(200) * bins // 200, (right - confidence)[order])).sum() / 200
    assert equal_mass_ece(logits, targets, bins=bins).item() == pytest.approx(masses, rel=1e-12)
    released = equal_mass_ece(logits, targets, bins=bins, released=True).item()
    assert released == pytest.approx(adaptive(confidence, right, bins), rel=1e-12)
    if (bins, decimals) == (15, 16):
        assert released == pytest.approx(case("adaece"), rel=1e-9)


@pytest.mark.parametrize("bins", [1, 4, 40])
def test_any_number_of_bins_against_numpy(bins):
    logits, targets = draw()
    p, y = logits.softmax(1).numpy(), targets.numpy()
    places = np.minimum(p * bins, bins - 1).astype(int)
    errors = [np.bincount(places[:, k], (y == k) - p[:, k]) for k in range(7)]
    expected = np.mean([np.abs(each).sum() for each in errors]) / 300
    assert classwise_ece(logits, targets, bins=bins).item() == pytest.approx(expected, rel=1e-12)
    own = places.max(1)
    gaps, counts = np.bincount(own, (p.argmax(1) == y) - p.max(1)), np.bincount(own, minlength=bins)
    assert ece(logits, targets, bins).item() == pytest.approx(np.abs(gaps).sum() / 300, rel=1e-12)
    assert mce(logits, targets, bins).item() == pytest.approx(np.max(np.abs(gaps) / counts.clip(1)[: len(gaps)]))
    assert reliability_bins(logits, targets, bins)["count"] == counts.tolist()


def test_classes_that_are_present():
    """The authors average over the classes 0 to max(targets), so that of 4 classes with labels 0 and 1 two count."""
    logits, targets = draw(k=4)
    p, y = logits.softmax(1).numpy(), (targets % 2).numpy()
    errors = [np.abs(np.bincount((p[:, k] * 15).astype(int), (y == k) - p[:, k])).sum() / 300 for k in (0, 1)]
    assert classwise_ece(logits, targets % 2, present=True).item() == pytest.approx(np.mean(errors), rel=1e-12)
    assert classwise_ece(logits, targets, present=True) == classwise_ece(logits, targets)
    last = classwise_ece(logits[:, [2, 3, 0, 1]], targets % 2 + 2, present=True)
    assert last.item() == pytest.approx(np.mean(errors), rel=1e-12)


def test_five_million_samples_of_two_classes():
    """Each of 7 confidences is off by 0.00036, up or down in turn: sums in float32 are off by more than that."""
    confidence = (np.arange(8, 15) + 0.5) / 15
    count = 714_000
    right = np.rint(count * (confidence + 0.00036 * (-1.0) ** np.arange(7))).astype(int)
    margins = torch.tensor(np.log(confidence / (1 - confidence))).repeat_interleave(count)
    wrong = torch.tensor(np.arange(count) >= right[:, None]).flatten()
    found = ece(torch.stack([margins, torch.zeros_like(margins)], dim=1), wrong.long()).item()
    assert found == pytest.approx(np.abs(right / count - confidence).mean(), rel=1e-9)
    assert found == pytest.approx(0.00036, abs=1e-6)


# ---- the temperature


@pytest.mark.parametrize("scale", [0.05, 1.0, 300.0])
def test_the_temperature_minimises_the_likelihood(scale):
    logits, targets = draw(scale=scale)
    found = post_hoc_temperature(logits, targets).item()

    def loss(u):
        return nll(logits / math.exp(u), targets).item()

    expected = math.exp(minimize_scalar(loss, bracket=(math.log(scale), math.log(scale) + 1), tol=1e-12).x)
    assert found == pytest.approx(expected, rel=1e-5)
    z = (logits / found).requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(z, targets), z)
    assert abs((grad * z).sum().item()) < 1e-12  # the slope in log T
    assert post_hoc_temperature(7 * logits, targets).item() == pytest.approx(7 * found, rel=1e-11)


def test_the_temperature_at_its_ends():
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert post_hoc_temperature(logits, torch.tensor([0, 1])).item() == 0  # all right: no largest likelihood
    assert post_hoc_temperature(logits, torch.tensor([1, 0])).item() == math.inf  # worse than knowing nothing
    assert post_hoc_temperature(torch.zeros(2, 3), torch.tensor([0, 1])).item() == math.inf
    assert post_hoc_temperature(torch.tensor([[1e4, 0], [1e-4, 0]]), torch.tensor([0, 1])).item() > 0


# ---- selective prediction


def test_the_authors_scores():
    data = GOLDEN["inputs"]["calibration"]
    (found,) = [c for c in GOLDEN["cases"] if c["key"] == "xia_score" and c["hyper"]["add_unit"] == "mean"]
    expected = torch.tensor(found["expected"]["score"], dtype=torch.float64)
    logits = torch.tensor(data["z"], dtype=torch.float64)
    torch.testing.assert_close(normalised_max_logit(logits, found["hyper"]["p"]), expected, rtol=1e-9, atol=1e-10)


def test_the_authors_area_is_ours_less_half_a_step_of_the_error_rate():
    logits, targets = golden_inputs()
    error = (logits.argmax(1) != targets).double().mean().item()
    ours = aurc_normalised_logits(logits, targets, p=4).item()
    assert ours - error / 400 == pytest.approx(case("xia_aurc"), rel=1e-9)
    # and it is the trapezoids from (0, 0)
    wrong = (logits.argmax(1) != targets).double().numpy()[np.argsort(-normalised_max_logit(logits).numpy())]
    risk = np.concatenate([[0], np.cumsum(wrong) / np.arange(1, 201)])
    assert np.trapezoid(risk, np.linspace(0, 1, 201)) == pytest.approx(case("xia_aurc"), rel=1e-9)


def test_equal_scores_have_no_order():
    scores = torch.tensor([0.9, 0.5, 0.5, 0.1])
    correct = torch.tensor([True, False, True, True])
    by_hand = (0 + 0.5 / 2 + 1 / 3 + 1 / 4) / 4
    assert aurc(scores, correct).item() == pytest.approx(by_hand)
    assert aurc(scores, correct[[0, 2, 1, 3]]).item() == pytest.approx(by_hand)
    assert aurc(torch.zeros(4), correct).item() == pytest.approx(0.25)  # the error rate


def test_the_usual_area_ranks_by_confidence():
    logits, targets = draw()
    confidence = logits.softmax(1).amax(1)
    assert aurc_max_probability(logits, targets) == aurc(confidence, logits.argmax(1) == targets)


def test_the_normalised_score_does_not_see_the_scale():
    logits, _ = draw()
    for factor in (1e-100, 1e100):
        torch.testing.assert_close(normalised_max_logit(factor * logits), normalised_max_logit(logits))
    assert normalised_max_logit(torch.full((2, 3), 5.0)).tolist() == [0, 0]
    assert normalised_max_logit(torch.tensor([[3.0, 0, 0]]), math.inf).item() == 1


def test_right_and_wrong_are_booleans():
    """Of integers, ~ would silently be -1 and -2."""
    with pytest.raises(ValueError, match=r"must be \(N,\) finite numbers and \(N,\) bool"):
        aurc(torch.zeros(3), torch.ones(3, dtype=torch.int64))
