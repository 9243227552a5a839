"""Accuracy, likelihood, Brier score, calibration and fidelity against hand values, scikit-learn and numpy."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score

from kd.metrics import agreement, brier, ece, nll, predictive_kl, reliability_bins, top_k_accuracy


@pytest.fixture(params=[(1, 2), (500, 10)], ids=str)
def predictions(request):
    n, k = request.param
    generator = torch.Generator().manual_seed(n)
    logits = 3 * torch.randn(n, k, generator=generator)
    targets = torch.where(torch.rand(n, generator=generator) < 0.6, logits.argmax(1), torch.arange(n) % k)
    return logits, targets


def softmax(logits):
    z = logits.double().numpy()
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def scores(logits, targets):
    return [metric(logits, targets).item() for metric in (top_k_accuracy, nll, brier, ece)]


def test_the_ends_of_the_scales():
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    sure = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert scores(sure, right) == [1, 0, 0, pytest.approx(0, abs=2e-6)]
    assert scores(sure, wrong) == [0, 2e4, 2, pytest.approx(1, abs=2e-6)]
    constant = torch.zeros(20, 10), torch.arange(20) % 10  # knows nothing, and does not get credit for ties
    assert scores(*constant) == pytest.approx([0.1, math.log(10), 0.9, 0], abs=1e-6)


def test_against_scikit_learn_and_numpy(predictions):
    logits, targets = predictions
    k = logits.shape[1]
    p, y = softmax(logits), targets.numpy()
    assert nll(logits, targets).item() == pytest.approx(log_loss(y, p, labels=range(k)), rel=1e-9)
    assert brier(logits, targets).item() == pytest.approx(((p - np.eye(k)[y]) ** 2).sum(1).mean(), rel=1e-9)
    for top in range(1, k):
        if k == 2:
            expected = (p.argmax(1) == y).mean()
        else:
            expected = top_k_accuracy_score(y, logits.numpy(), k=top, labels=range(k))
        assert top_k_accuracy(logits, targets, top).item() == pytest.approx(expected)


def test_the_bins_of_a_reliability_diagram_and_their_error(predictions):
    logits, targets = predictions
    p = softmax(logits)
    places = np.minimum(np.floor(p.max(1) * 15), 14)
    bins = reliability_bins(logits, targets)
    error = 0.0
    for b, count, confidence, accuracy in zip(range(15), *bins.values(), strict=True):
        inside = places == b
        assert count == inside.sum()
        if count:
            assert confidence == pytest.approx(p.max(1)[inside].mean())
            assert accuracy == pytest.approx((p.argmax(1) == targets.numpy())[inside].mean())
            error += inside.mean() * abs(accuracy - confidence)
        else:
            assert confidence is accuracy is None
    assert ece(logits, targets).item() == pytest.approx(error, abs=1e-5)


def test_a_confidence_of_exactly_one_is_in_the_last_bin():
    # In a bin of its own the sure one would give 1/2 |0 - 1| + 1/2 |1 - 0.95|
    logits = torch.tensor([[1000.0, 0.0], [math.log(19), 0.0]])
    assert ece(logits, torch.tensor([1, 0])).item() == pytest.approx(0.975 - 0.5, abs=1e-5)


def test_ties_rank_as_argmax_does():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]]).repeat(4, 1)
    ranks = [[top_k_accuracy(logits[:1], torch.tensor([c]), k).item() for k in (1, 2, 3, 4)] for c in range(4)]
    assert ranks == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]


def test_agreement_by_hand():
    a = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [5.0, 0.0, 4.0]])
    b = torch.tensor([[9.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 7.0], [3.0, 0.0, 4.0]])
    assert agreement(a, b).item() == 0.5
    assert agreement(a, a + 1).item() == 1
    a = torch.tensor([[4.0, 3, 2, 1], [1, 1, 1, 1], [1, 2, 3, 4]])
    b = torch.tensor([[4.0, 1, 3, 2], [0, 0, 5, 5], [4, 3, 2, 1]])
    # top 2: {0,1} and {0,2}; {0,1} (ties) and {2,3}; {3,2} and {0,1}
    assert agreement(a, b, 2).item() == pytest.approx(1 / 6)
    assert agreement(a, b, 3).item() == pytest.approx((2 + 2 + 2) / 9)
    assert agreement(a, b, 4).item() == agreement(a, b, 5).item() == 1


def test_predictive_kl_by_hand_by_numpy_and_not_symmetric():
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)  # 3/4, 1/4
    student = torch.tensor([[0.0, 0.0]], dtype=torch.float64)  # 1/2, 1/2
    there, back = predictive_kl(teacher, student).item(), predictive_kl(student, teacher).item()
    assert there == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert back == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    a, b = 3 * torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(0))
    p, q = softmax(a), softmax(b)
    assert predictive_kl(a, b).item() == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-9)
    assert predictive_kl(a, a + torch.arange(50)[:, None]).item() == pytest.approx(0, abs=1e-6)
    assert math.isfinite(predictive_kl(1e4 * a, -1e4 * b).item())
