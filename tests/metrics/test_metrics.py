"""Metrics against hand values, against scikit-learn, and against numpy."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, top_k_accuracy_score

from kd.metrics import (
    agreement,
    brier,
    classification,
    compute,
    ece,
    nll,
    predictive_kl,
    reliability_bins,
    top_k_accuracy,
)


@pytest.fixture(params=[(1, 2), (7, 3), (500, 10), (300, 4)], ids=str)
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


def ece_by_hand(logits, targets, bins=15):
    p = softmax(logits)
    total = 0.0
    for b in range(bins):
        inside = np.minimum(np.floor(p.max(1) * bins), bins - 1) == b
        if inside.any():
            gap = (p.argmax(1) == targets.numpy())[inside].mean() - p.max(1)[inside].mean()
            total += inside.mean() * abs(gap)
    return total


def test_hand_values():
    # probabilities (3/4, 1/4), (1/4, 3/4), (1/2, 1/2) and (3/4, 1/4)
    logits = torch.tensor([[math.log(3), 0], [0, math.log(3)], [0, 0], [math.log(3), 0]], dtype=torch.float64)
    targets = torch.tensor([0, 0, 0, 0])
    assert top_k_accuracy(logits, targets).item() == 0.75
    assert top_k_accuracy(logits, targets, 2).item() == 1
    assert nll(logits, targets).item() == pytest.approx((3 * math.log(4) + math.log(2) - 2 * math.log(3)) / 4)
    assert brier(logits, targets).item() == pytest.approx((2 / 16 + 18 / 16 + 2 / 4 + 2 / 16) / 4)
    # the bin of 3/4 has 3 samples of which 2 are right, the bin of 1/2 has one that is right
    assert ece(logits, targets).item() == pytest.approx(3 / 4 * (3 / 4 - 2 / 3) + 1 / 4 * (1 - 1 / 2))


def test_the_ends_of_the_scales():
    right, wrong = torch.tensor([0, 1]), torch.tensor([1, 0])
    sure = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    assert classification(sure, right) == {
        "top1": 1,
        "top5": 1,
        "nll": 0,
        "ece": pytest.approx(0, abs=2e-6),
        "brier": 0,
    }
    found = classification(sure, wrong)
    assert found == {"top1": 0, "top5": 1, "nll": 2e4, "ece": pytest.approx(1, abs=2e-6), "brier": 2}
    constant = torch.zeros(20, 10)
    found = classification(constant, torch.arange(20) % 10)
    assert found["top1"] == 0.1  # knows nothing, and does not get credit for ties
    assert found["top5"] == 0.5
    assert found["nll"] == pytest.approx(math.log(10))
    assert found["brier"] == pytest.approx(0.9)
    assert found["ece"] == pytest.approx(0, abs=1e-6)


def test_against_scikit_learn_and_numpy(predictions):
    logits, targets = predictions
    k = logits.shape[1]
    p, y = softmax(logits), targets.numpy()
    assert nll(logits, targets).item() == pytest.approx(log_loss(y, p, labels=range(k)), rel=1e-9)
    assert brier(logits, targets).item() == pytest.approx(((p - np.eye(k)[y]) ** 2).sum(1).mean(), rel=1e-9)
    assert ece(logits, targets).item() == pytest.approx(ece_by_hand(logits, targets), abs=1e-5)
    for top in range(1, k):
        if k == 2:
            expected = (p.argmax(1) == y).mean()
        else:
            expected = top_k_accuracy_score(y, logits.numpy(), k=top, labels=range(k))
        assert top_k_accuracy(logits, targets, top).item() == pytest.approx(expected)


def test_classification_is_the_functions_as_floats(predictions):
    logits, targets = predictions
    found = classification(logits, targets)
    assert found == {
        "top1": top_k_accuracy(logits, targets, 1).item(),
        "top5": top_k_accuracy(logits, targets, min(5, logits.shape[1])).item(),
        "nll": nll(logits, targets).item(),
        "ece": ece(logits, targets).item(),
        "brier": brier(logits, targets).item(),
    }
    assert all(type(value) is float for value in found.values())


def test_a_confidence_of_exactly_one_is_in_the_last_bin():
    # In torchmetrics' phantom bin the sure one would be a bin of its own: 1/2 |0 - 1| + 1/2 |1 - 0.95|
    logits = torch.tensor([[1000.0, 0.0], [math.log(19), 0.0]])
    assert ece(logits, torch.tensor([1, 0])).item() == pytest.approx(0.975 - 0.5, abs=1e-5)


def test_low_precision_logits_are_summed_in_float64():
    logits = torch.randn(4000, 10, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = torch.arange(4000) % 10
    for metric in (nll, brier, ece, top_k_accuracy):
        assert metric(logits, targets).dtype == torch.float64
        assert metric(logits, targets).item() == metric(logits.double(), targets).item()
    assert (
        predictive_kl(logits, logits.roll(1, 0)).item()
        == predictive_kl(logits.double(), logits.double().roll(1, 0)).item()
    )


def test_ties_rank_as_argmax_does():
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0]]).repeat(4, 1)
    ranks = [[top_k_accuracy(logits[:1], torch.tensor([c]), k).item() for k in (1, 2, 3, 4)] for c in range(4)]
    assert ranks == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]


def test_agreement_counts_equal_predictions():
    a = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [5.0, 0.0, 4.0]])
    b = torch.tensor([[9.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 7.0], [3.0, 0.0, 4.0]])
    assert agreement(a, b).item() == 0.5
    assert agreement(a, a + 1).item() == 1


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


def test_the_student_is_not_trained_through_a_metric():
    logits = torch.randn(4, 3, requires_grad=True)
    assert not nll(logits, torch.tensor([0, 1, 2, 0])).requires_grad
    assert not predictive_kl(logits, logits).requires_grad


GOOD, LABELS = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(0, 3), LABELS[:0], r"logits has shape \(0, 3\): must be \(N, K\)"),
        (torch.zeros(4, 0), LABELS, r"logits has shape \(4, 0\): must be \(N, K\)"),
        (torch.zeros(4), LABELS, r"logits has shape \(4,\): must be \(N, K\)"),
        (torch.zeros(4, 3, 2), LABELS, r"logits has shape \(4, 3, 2\)"),
        (torch.zeros(4, 3, dtype=torch.int64), LABELS, "logits is torch.int64: must be floating point"),
        (GOOD.where(GOOD == 1, math.nan), LABELS, "logits has 4 rows with nan or inf"),
        (torch.tensor([[0, math.inf, 0]]), LABELS[:1], "logits has 1 rows with nan or inf"),
        (GOOD, LABELS[:3], r"targets are torch.int64 of shape \(3,\): must be int64 of shape \(4,\)"),
        (GOOD, LABELS[:, None], r"targets are torch.int64 of shape \(4, 1\)"),
        (GOOD, LABELS.float(), r"targets are torch.float32 of shape \(4,\)"),
        (GOOD, torch.full((4, 5), 0.2), r"targets are torch.float32 of shape \(4, 5\)"),
        (GOOD, LABELS - 1, "targets go from -1 to 1: must be from 0 to 2, logits have 3 classes"),
        (GOOD, LABELS + 1, "targets go from 1 to 3: must be from 0 to 2"),
    ],
)
@pytest.mark.parametrize("metric", [top_k_accuracy, nll, brier, ece, classification])
def test_misuse_is_one_line(metric, logits, targets, message):
    with pytest.raises(ValueError, match="^" + message) as error:
        metric(logits, targets)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_has_to_be_a_number_of_classes(k):
    with pytest.raises(ValueError, match=f"^k={k}: must be from 1 to 3, the number of classes$"):
        top_k_accuracy(GOOD, LABELS, k)


@pytest.mark.parametrize("metric", [agreement, predictive_kl])
def test_two_networks_have_to_predict_the_same_classes(metric):
    with pytest.raises(ValueError, match=r"has shape \(4, 3\), \w+ has \(4, 5\): must be the same$"):
        metric(GOOD, torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"has shape \(4, 3\), \w+ has \(1, 3\)"):  # torch would broadcast it
        metric(GOOD, GOOD[:1])
    with pytest.raises(ValueError, match=r"^(b|student) has 4 rows with nan or inf"):
        metric(GOOD, GOOD * math.nan)


def test_metrics_can_be_imported_without_the_rest():
    import subprocess
    import sys

    heavy = {"torchmetrics", "timm", "torchvision", "sklearn", "kd.config.schema"}
    code = f"import sys, kd.metrics; print(sorted({heavy} & {{*sys.modules}}))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_study_measures_what_the_registry_says():
    logits = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(20) % 4
    evidence = {"logits": logits, "targets": targets, "temperature": None, "reference": logits.roll(1, 0)}
    student = compute(evidence | {"teacher": logits.roll(1, 0)}, "test", "student")
    assert student["nll"] == nll(logits, targets).item()
    assert student["agreement"] == agreement(logits, logits.roll(1, 0)).item()
    assert student["nll_scaled"] is None  # no temperature could be fitted
    assert "class_separation" not in student  # no features were given
    assert "agreement" not in compute(evidence, "test", "control")
    assert "nt_kl" not in compute(evidence, "train", "student")
    two = compute({"logits": logits[:, :2], "targets": targets % 2, "reference": logits[:, 2:]}, "test", "student")
    assert two["nt_kl"] is None  # one wrong class has no rank


def test_the_bins_of_a_reliability_diagram_make_its_error(predictions):
    logits, targets = predictions
    bins = reliability_bins(logits, targets)
    full = [row for row in zip(*bins.values(), strict=True) if row[0]]
    assert sum(bins["count"]) == len(targets)
    error = sum(count * abs(accuracy - confidence) for count, confidence, accuracy in full) / len(targets)
    assert ece(logits, targets).item() == pytest.approx(error, abs=1e-5)
    assert sum(count * accuracy for count, _, accuracy in full) == pytest.approx(
        len(targets) * top_k_accuracy(logits, targets).item()
    )
