"""Both conventions of label smoothing against hand values, F.cross_entropy and the identities they satisfy."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd.smoothing import SMOOTHINGS, from_uniform, smooth_targets, to_uniform

EPS = st.floats(0, 0.99)
CLASSES = st.integers(1, 1000)


def probabilities(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


def test_the_five_class_example_in_both_conventions():
    label = torch.tensor([1])
    uniform = smooth_targets(label, 5, 0.1, dtype=torch.float64)
    others = smooth_targets(label, 5, 0.1, "others", dtype=torch.float64)
    torch.testing.assert_close(uniform, torch.tensor([[0.02, 0.92, 0.02, 0.02, 0.02]], dtype=torch.float64))
    torch.testing.assert_close(others, torch.tensor([[0.025, 0.9, 0.025, 0.025, 0.025]], dtype=torch.float64))


def test_conversion_by_hand():
    assert to_uniform(0.1, 10, "uniform") == 0.1
    assert to_uniform(0.09, 10, "others") == pytest.approx(0.1, rel=1e-15)
    assert to_uniform(0.9, 2, "others") == pytest.approx(1.8, rel=1e-15)  # above 1: more on the other class than on y
    assert to_uniform(0.3, 1, "others") == 0.0
    assert from_uniform(0.1, 10, "others") == pytest.approx(0.09, rel=1e-15)
    assert from_uniform(1.8, 2, "others") == pytest.approx(0.9, rel=1e-15)
    assert from_uniform(0.7, 1, "others") == 0.0


@given(EPS, st.integers(2, 1000), st.sampled_from(SMOOTHINGS))
def test_conversion_and_back(eps, num_classes, smoothing):
    assert from_uniform(to_uniform(eps, num_classes, smoothing), num_classes, smoothing) == pytest.approx(
        eps, rel=1e-14
    )


@given(EPS, CLASSES, st.sampled_from(SMOOTHINGS))
def test_label_keeps_what_its_convention_says_and_the_rest_is_even(eps, num_classes, smoothing):
    y = num_classes // 2
    target = smooth_targets(torch.tensor(y), num_classes, eps, smoothing, torch.float64)
    if num_classes == 1:
        kept, rest = 1.0, 0.0
    elif smoothing == "uniform":
        kept, rest = 1 - eps + eps / num_classes, eps / num_classes
    else:
        kept, rest = 1 - eps, eps / (num_classes - 1)
    assert target[y].item() == pytest.approx(kept, abs=1e-14)
    assert target[torch.arange(num_classes) != y].tolist() == pytest.approx([rest] * (num_classes - 1), abs=1e-15)
    assert target.sum().item() == pytest.approx(1, abs=1e-12)


def test_a_smoothed_teacher_floors_its_log_ratios():
    """log q_j/q_k = log (p_j + e')/(p_k + e') with e' = eps / (K (1 - eps)): what a temperature then divides."""
    p, eps = probabilities((50, 8), seed=1), 0.2
    q = smooth_targets(p, 8, eps, dtype=torch.float64)
    floor = eps / (8 * (1 - eps))
    torch.testing.assert_close((q[:, 1:] / q[:, :1]).log(), ((p[:, 1:] + floor) / (p[:, :1] + floor)).log())


def test_vmap_and_compile_agree_with_eager():
    label = torch.tensor([3, 0, 2])
    expected = smooth_targets(label, 4, 0.1, "others")
    assert torch.equal(torch.func.vmap(lambda y: smooth_targets(y, 4, 0.1, "others"))(label), expected)
    compiled = torch.compile(smooth_targets, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(label, 4, 0.1, "others"), expected)


LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: to_uniform(-0.1, 5, "uniform"), ValueError, r"label_smoothing=-0.1: must be a number ≥ 0 and < 1"),
        (lambda: to_uniform(0.1, 0, "uniform"), ValueError, r"num_classes=0: must be a whole number ≥ 1"),
        (lambda: to_uniform(0.1, 5, "other"), ValueError, r"smoothing='other': must be one of uniform, others"),
        (lambda: from_uniform(1.25, 5, "others"), ValueError, r"uniform_mass=1.25: .*K/\(K-1\)"),
        (lambda: smooth_targets(LABELS - 1, 2, 0.1), ValueError, r"target has label -1: must be 0\.\.1"),
        (lambda: smooth_targets(torch.ones(1, 2), 2, 0.1), ValueError, r"target has a row that sums to 2"),
    ],
)
def test_bad_input_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
