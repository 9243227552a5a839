"""Identities of the logit methods, hand values, and the claims of their docstrings."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from golden_logits import FILE, np_pearson, softmax
from golden_table import TOLERANCE, tensor
from method_batches import draw
from method_batches import logit_batch as batch
from method_batches import logit_values as ready

from kd.losses.methods.base import Seen, View
from kd.losses.methods.batch_logits import DIST
from kd.losses.methods.decoupled import DKD, NKD, RLD
from kd.losses.methods.logits import KD, WSL
from kd.losses.methods.temperature import CTKD, LogitStandardKD, arithmetic_mean


def gradient(values, s):
    return torch.autograd.grad(values.sum(), s)[0]


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_with_the_teachers_own_weight_is_kd(temperature):
    """KL = TCKD + (1 - p_y) NCKD, one example at a time because the weight is the example's."""
    s, t, y = batch(8, 6)
    rest = 1 - (t / temperature).softmax(-1).gather(-1, y[:, None])[:, 0]
    for i in range(len(s)):
        row = slice(i, i + 1)
        ours = ready(DKD(1.0, rest[i].item(), temperature), s[row], t[row], y[row])
        plain = ready(KD(temperature), s[row], t[row], y[row])
        close(ours, plain)
        close(gradient(ours, s), gradient(plain, s))


@pytest.mark.parametrize("method", ["dkd", "mlkd"])
def test_standardized_logits_have_no_scale_and_no_offset(method):
    s, t, y = batch()
    a, b = draw(6, 1, seed=5).exp(), draw(6, 1, seed=6)
    lskd = LogitStandardKD(method)
    close(ready(lskd, s, t, y), ready(lskd, a * s + b, t / a - b, y), 1e-10)


def test_a_row_without_variation_standardizes_to_zeros():
    for dtype in (torch.float32, torch.float64):
        flat = torch.full((3, 7), 0.1, dtype=dtype) * torch.tensor([[1.0], [1e4], [0.0]], dtype=dtype)
        s = flat.requires_grad_()
        values = ready(LogitStandardKD(), s, draw(3, 7).to(dtype), torch.tensor([0, 1, 2]))
        assert values.isfinite().all()
        assert gradient(values, s).abs().max() == 0


def test_dist_knows_the_correlation_of_columns_too_small_for_float32():
    s, t, y = batch(6, 4)
    s, t = s.detach().clone(), t.clone()
    s[:, 0] += 60
    t[:, 0] += 60  # the other columns are e^-60 in both, their squares nothing in float32
    p, q = softmax(s.numpy()), softmax(t.numpy())
    columns = np_pearson(p[:, 1:], q[:, 1:], 0).sum() / 4  # column 0 is all ones and counts 0
    exact = 2 - np_pearson(p, q, 1).mean() - columns
    assert abs(columns) > 0.01
    assert ready(DIST(temperature=1.0), s, t, y).item() == pytest.approx(exact, rel=1e-10)
    assert ready(DIST(temperature=1.0), s.float(), t.float(), y).item() == pytest.approx(exact, abs=1e-4)


def test_wsls_weight_where_a_cross_entropy_is_zero():
    """A certain teacher: weight 1; both certain: 1 - 1/e, as for any two that are equally good."""
    y = torch.tensor([0, 0])
    t = torch.tensor([[1e3, 0.0, -5.0], [1e3, 0.0, -5.0]])
    s = torch.tensor([[1.0, 0.0, 0.0], [1e3, 0.0, 0.0]], requires_grad=True)
    log_s, p_t = F.log_softmax(s / 4, -1), F.softmax(t / 4, -1)
    expected = torch.tensor([1.0, 1 - math.exp(-1)]) * 16 * -(p_t * log_s).sum(-1)
    torch.testing.assert_close(ready(WSL(), s, t, y).float(), expected)


def test_ctkd_reverses_and_scales_the_gradient_of_its_temperature():
    s, t, y = batch()
    method = CTKD(curriculum_epochs=4.0)
    seen = Seen(View(s), View(t), y)
    method.build(seen)
    method.double()

    def at(theta):
        temperature = 1 + 20 / (1 + math.exp(-theta))
        return ready(KD(temperature), s, t, y).sum().item()

    slope = (at(1 + 1e-5) - at(1 - 1e-5)) / 2e-5
    # From the epochs done to the strength: the first epoch is the running one of number 1.
    for epoch, strength in (
        (0.0, 0.5 * (1 - math.cos(math.pi / 4))),
        (0.9, 0.146447),
        (1.0, 0.5),
        (3.0, 1.0),
        (50.0, 1.0),
    ):
        seen = Seen(View(s), View(t), y, epoch=epoch, epochs=60)
        method.zero_grad()
        values = method.evaluate(seen)
        values.sum().backward()
        assert method.temperature_logit.grad.item() == pytest.approx(-strength * slope, rel=1e-5)
        close(values, ready(KD(method.temperature().item()), s, t, y))  # the strength is in the gradient alone
    assert gradient(method.evaluate(seen), s).abs().sum() > 0


def test_several_teachers_that_are_certain_of_different_classes_become_one():
    far = arithmetic_mean(torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]]), 1.0)
    torch.testing.assert_close(far.softmax(-1), torch.tensor([[0.5, 0.5]]))


@pytest.mark.parametrize("margin", [20.0, 110.0, 1e4])
def test_dkd_and_its_kin_are_exact_at_margins_where_probabilities_round_to_one(margin):
    """Logs of probabilities give NaN here: mdistiller's DKD at margin 110 in float32, at 20 in float16."""
    y = torch.tensor([0, 1])
    for dtype, label in itertools.product((torch.float16, torch.float32), (y, 1 - y)):
        t, s = margin * F.one_hot(label, 4).to(dtype), draw(2, 4).to(dtype).requires_grad_()
        for method in (DKD(temperature=1.0), NKD(), RLD()):
            values, exact = ready(method, s, t, y), ready(method, s.detach().double(), t.double(), y)
            torch.testing.assert_close(values.double(), exact, rtol=2e-5, atol=2e-5)
            assert gradient(values, s).isfinite().all()


@pytest.mark.parametrize(
    "case", [case for case in FILE["cases"] if "paper_loss" in case["expected"]], ids=lambda case: case["id"]
)
def test_the_default_is_the_papers_formula(case):
    inputs, h = FILE["inputs"][case["inputs"]], case["hyper"]
    temperature = h.get("T", h.get("tau"))
    method = {
        "dist": lambda: DIST(temperature=temperature),
        "lskd": lambda: LogitStandardKD(settings={"temperature": temperature}),
    }[case["key"]]()
    value = ready(method, tensor(inputs["s"]), tensor(inputs["t"]), torch.tensor(inputs["y"])).mean()
    # lskd's number has the code's 1e-7 beside the paper's divisor K.
    within = 1e-6 if case["key"] == "lskd" else TOLERANCE
    assert value.item() == pytest.approx(case["expected"]["paper_loss"], rel=within)
