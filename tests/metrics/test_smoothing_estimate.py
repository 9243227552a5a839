"""The estimate of label smoothing: exact at the optimum, and doubted where it should be."""

import math

import pytest
import torch
import torch.nn.functional as F

from kd.metrics import estimate_smoothing
from kd.smoothing import smooth_targets


def at_optimum(eps, classes, count=400):
    """Logits whose softmax is the smoothed target itself, in rows shifted at will."""
    targets = torch.arange(count) % classes
    q = smooth_targets(targets, classes, eps, dtype=torch.float64)
    return q.log() + torch.linspace(-9, 9, count, dtype=torch.float64)[:, None], targets


@pytest.mark.parametrize("eps", [0.03, 0.1, 0.4, 0.8])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_it_is_exact_at_the_optimum(eps, classes):
    found = estimate_smoothing(*at_optimum(eps, classes))
    assert (found.label_smoothing, found.low, found.high) == pytest.approx((eps, eps, eps), rel=1e-9)
    assert found.unevenness == pytest.approx(0, abs=1e-12)
    assert (found.accuracy, found.count, found.doubts) == (1.0, 400, ())


def test_the_optimum_of_pytorchs_own_loss_has_its_smoothing():
    """Free logits trained with F.cross_entropy."""
    targets = torch.arange(120) % 6
    logits = torch.zeros(120, 6, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, targets, label_smoothing=0.15)
        loss.backward()
        return loss

    optimizer.step(closure)
    found = estimate_smoothing(logits.detach(), targets)
    assert found.label_smoothing == pytest.approx(0.15, rel=1e-4)
    assert found.doubts == ()


def test_the_range_is_that_of_the_samples_and_wrong_samples_do_not_count():
    masses = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64).repeat_interleave(100)
    targets = torch.arange(500) % 10
    q = (1 - masses[:, None]) * F.one_hot(targets, 10) + masses[:, None] / 10
    logits = q.log()
    wrong = -logits[:200]  # the target's is the least
    found = estimate_smoothing(torch.cat([logits, wrong]), torch.cat([targets, targets[:200]]))
    assert (found.low, found.label_smoothing, found.high) == pytest.approx((0.1, 0.2, 0.3), rel=1e-9)
    assert found.accuracy == pytest.approx(500 / 700)
    assert found.count == 500


def test_each_doubt():
    logits, targets = at_optimum(0.1, 10)
    assert estimate_smoothing(logits, targets).doubts == ()
    few = estimate_smoothing(logits[:99], targets[:99]).doubts
    assert few == ("only 99 samples are classified correctly",)
    poor = estimate_smoothing(logits, torch.where(torch.arange(400) < 180, (targets + 1) % 10, targets)).doubts
    assert len(poor) == 1
    assert poor[0].startswith("only 55% of the samples are classified correctly")
    sure = estimate_smoothing(*at_optimum(0.019, 10)).doubts
    assert sure == ("a mass below 0.02 is found without smoothing too",)
    uneven = logits.clone()
    for step in (1, 2):
        uneven[torch.arange(400), (targets + step) % 10] += 4.4  # the target's own exceeds it by 0.11
    (found,) = estimate_smoothing(uneven, targets).doubts
    assert "the other classes' logits differ by" in found


@pytest.mark.parametrize("logits", [torch.eye(4)[[1, 2, 3, 0]] * 5, torch.zeros(4, 4) + 1e-30])
def test_degenerate_logits_give_a_doubted_number(logits):
    found = estimate_smoothing(logits.double(), torch.arange(4))
    assert found.doubts
    assert math.isnan(found.label_smoothing) or found.label_smoothing == 1
