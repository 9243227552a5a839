"""Taking a teacher's smoothing out: an exact inverse, in the losses too, on every backend that runs here."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kd import DistillLoss, LinearDistillLoss, distill_loss
from kd.smoothing import SMOOTHINGS, smooth_targets, to_uniform, unsmooth

K = 7
LOGITS = torch.zeros(2, 3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def clean(rows=40, classes=K, seed=0, spread=3.0):
    """Teachers' probabilities from nearly uniform to nearly one-hot, float64."""
    return (spread * torch.randn(rows, classes, generator=seeded(seed), dtype=torch.float64)).softmax(-1)


def smoothed(p, eps, smoothing="uniform"):
    """Logits of an exactly smoothed teacher, shifted by a constant per row, which softmax does not see."""
    q = smooth_targets(p, p.shape[-1], eps, smoothing, torch.float64)
    return q.log() + torch.linspace(-5, 5, len(p), dtype=torch.float64)[:, None]


# --- the inverse


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-6, 0.8), st.sampled_from([2, 3, 10, 1000]), st.sampled_from(SMOOTHINGS), st.integers(0, 99))
def test_it_inverts_an_exactly_smoothed_teacher(eps, classes, smoothing, seed):
    if to_uniform(eps, classes, smoothing) >= 1:
        return
    p = clean(8, classes, seed)
    found = unsmooth(smoothed(p, eps, smoothing), eps, smoothing)
    # q carries p with an absolute error of its own rounding; what divides by 1 - eps magnifies it
    torch.testing.assert_close(found.softmax(-1), p, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_float32_inverts_to_its_own_rounding(smoothing):
    p = clean(200)
    found = unsmooth(smoothed(p, 0.3, smoothing).float(), 0.3, smoothing)
    assert found.dtype == torch.float32
    assert (found.double().exp() - p).abs().max() < 2e-6  # log-probabilities of up to 10 in size, 6e-8 each


def test_it_is_the_formula_at_the_level_of_probabilities():
    logits = torch.tensor([[2.0, 0.5, -0.5]], dtype=torch.float64)
    q = logits.softmax(-1)
    torch.testing.assert_close(unsmooth(logits, 0.12).exp(), (q - 0.04) / 0.88)
    torch.testing.assert_close(unsmooth(logits, 0.08, "others").exp(), (q - 0.04) / 0.88)  # 0.08 * 3/2 = 0.12


def test_small_probabilities_keep_their_digits():
    """p of 1e-9 beside eps = 1e-7: q - eps/K by subtraction of float64 is good to 1e-17, so p to 8 digits."""
    p = torch.tensor([[1 - 2.1e-8, 1e-9, 2e-8]], dtype=torch.float64)
    found = unsmooth(smoothed(p, 1e-7), 1e-7)
    torch.testing.assert_close(found.exp(), p, rtol=1e-7, atol=0)


def test_below_the_floor_of_smoothing_a_class_gets_the_least_that_rounding_can_tell():
    q = torch.tensor([[0.9, 0.02, 0.05, 0.03]], dtype=torch.float64)
    found = unsmooth(q.log(), 0.2)  # eps/K = 0.05, of which only the first class has more
    least = math.log(torch.finfo(torch.float64).eps * 0.05 / 0.8)
    expected = torch.tensor([[math.log(0.85 / 0.8), least, least, least]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert unsmooth(q.log().float(), 0.2).isfinite().all()


def test_a_masked_class_stays_masked_and_nan_stays_nan():
    logits = torch.tensor([[1.0, -math.inf, 0.0], [math.nan, 0.0, 0.0], [3.0, 1.0, 2.0]])
    found = unsmooth(logits, 0.1)
    assert found[0, 1] == -math.inf
    assert found[0, [0, 2]].isfinite().all()
    assert found[1].isnan().all()
    assert found[2].isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: unsmooth(LOGITS, 1.0), ValueError, r"^label_smoothing=1.0: must be a number ≥ 0 and < 1"),
        (lambda: unsmooth(torch.zeros(2, 2), 0.9, "others"), ValueError, r"=0.9: as a uniform mass 1.8"),
        (lambda: unsmooth(LOGITS.long(), 0.1), TypeError, "^logits: .*got torch.int64"),
        (lambda: unsmooth([0.0], 0.1), TypeError, r"^logits: .*got list"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- in the losses

SETTINGS = {"kd_weight": 0.7, "ce_weight": 0.3, "label_smoothing": 0.1}


def gradient_of(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("student_temperature", [None, 1.0])
def test_the_loss_of_a_smoothed_teacher_is_that_of_the_clean_one(backend, temperature, student_temperature):
    """The end-to-end oracle: after unsmoothing, nothing shows that the teacher was smoothed."""
    p, target = clean(30), torch.arange(30) % K
    student = torch.randn(30, K, generator=seeded(1), dtype=torch.float64).requires_grad_()
    logits = smoothed(p, 0.3)
    by_hand = ((logits.softmax(-1) - 0.3 / K) / 0.7).log()
    settings = {**SETTINGS, "student_temperature": student_temperature, "backend": backend}
    ours = DistillLoss(temperature, **settings, teacher_smoothing=0.3)(student, logits, target)
    for teacher in (p.log(), by_hand):
        expected = distill_loss(student, teacher, target, temperature, **settings)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        grads = gradient_of(ours, student), gradient_of(expected, student)
        torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)
        ours = distill_loss(student, logits, target, temperature, **settings, teacher_smoothing=0.3)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("made_here", [True, False])
def test_the_linear_loss_unsmooths_every_chunk(backend, made_here):
    """In chunks of few rows, from a teacher's logits and from its features and head."""
    wide = {"dtype": torch.float64, "generator": seeded(2)}
    features = torch.randn(50, 5, **wide).requires_grad_()
    weight, target = torch.randn(K, 5, **wide).requires_grad_(), torch.arange(50) % K
    p = clean(50)
    logits = smoothed(p, 0.3)
    teacher = {"teacher_logits": logits}
    if made_here:  # a head that is the identity makes features of the logits
        teacher = {"teacher_features": logits, "teacher_weight": torch.eye(K, dtype=torch.float64)}
    loss = LinearDistillLoss(**SETTINGS, backend=backend, teacher_smoothing=0.3, memory_budget=8 * K * 30)
    ours = loss(features, weight, target, **teacher)
    expected = distill_loss(F.linear(features, weight), p.log(), target, **SETTINGS, backend="reference")
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    grads = (torch.autograd.grad(value, (features, weight)) for value in (ours, expected))
    for ours_, expected_ in zip(*grads, strict=True):
        torch.testing.assert_close(ours_, expected_, rtol=1e-10, atol=1e-13)
