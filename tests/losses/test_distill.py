"""DistillLoss against hand values, PyTorch's own losses, the published KD code's numbers, and float64."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from loss_checks import assert_same, draw, value_and_grad

from kd import DistillLoss, distill_loss

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "kd.json").read_text())["cases"]
INF = math.inf


def batch(shape=(6, 5), seed=0, dtype=torch.float64):
    s, t = draw(*shape, seed=seed, dtype=dtype), draw(*shape, seed=seed + 1, dtype=dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(seed))
    return s.requires_grad_(), t, labels


# ---- values


@pytest.mark.parametrize("temperature", [1.0, 2.0, 8])
def test_two_classes_by_hand(temperature):
    """Softened p_s = (1/4, 3/4), p_t = (1/2, 1/2): KL = log(4/3) / 2; the loss multiplies it by T²."""
    s = temperature * torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    loss = distill_loss(s, torch.zeros_like(s), torch.tensor([1]), temperature, kd_weight=3.0, ce_weight=0.0)
    assert loss.item() == pytest.approx(3 * temperature**2 * math.log(4 / 3) / 2, rel=1e-14)


def test_smoothed_cross_entropy_by_hand():
    s, y = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64), torch.tensor([1])
    nll = math.log(4), math.log(4 / 3)
    for smoothing, other in (("uniform", 0.1), ("others", 0.2)):
        loss = distill_loss(s, None, y, kd_weight=0, ce_weight=2, label_smoothing=0.2, smoothing=smoothing)
        assert loss.item() == pytest.approx(2 * (other * nll[0] + (1 - other) * nll[1]), rel=1e-14)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_published_kd_numbers(case):
    s, t = (torch.tensor(case[key], dtype=torch.float64) for key in ("student", "teacher"))
    labels = torch.zeros(len(s), dtype=torch.int64)
    loss = DistillLoss(case["temperature"], kd_weight=1.0, ce_weight=0.0)
    value, grad = value_and_grad(lambda z: loss(z, t, labels), s.requires_grad_())
    expected = torch.tensor(case["gradient"], dtype=torch.float64)
    assert value.item() == pytest.approx(case["loss"], rel=1e-9)
    assert (grad - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (5,), (4, 1)])
def test_kd_term_is_pytorchs_kl_div(shape, temperature):
    s, t, y = batch(shape)

    def theirs(z):
        log_s, log_t = F.log_softmax(z / temperature, -1), F.log_softmax(t / temperature, -1)
        return temperature**2 * F.kl_div(log_s, log_t, reduction="sum", log_target=True) / y.numel()

    assert_same(lambda z: distill_loss(z, t, y, temperature, kd_weight=1, ce_weight=0), theirs, s)
    assert_same(
        lambda z: distill_loss(z, t, y, temperature, kd_weight=1, ce_weight=0, reduction="sum"),
        lambda z: y.numel() * theirs(z),
        s,
    )


WEIGHT = torch.tensor([0.3, 2.0, 0.0, 1.0, 5.0], dtype=torch.float64)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("class_weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_ce_term_is_pytorchs_cross_entropy(eps, class_weight, soft, shape):
    s, _, y = batch(shape)
    if not soft:
        y[..., 1] = -100
    target = draw(*shape, seed=9).softmax(-1) if soft else y
    last = (lambda x: x.movedim(-1, 1)) if s.ndim > 2 else (lambda x: x)  # F.cross_entropy has its classes second

    def theirs(z, reduction):
        moved = last(target) if soft else target
        return F.cross_entropy(last(z), moved, class_weight, reduction=reduction, label_smoothing=eps)

    def ours(z, reduction):
        settings = {"kd_weight": 0, "ce_weight": 1, "label_smoothing": eps, "class_weight": class_weight}
        return distill_loss(z, None, target, reduction=reduction, **settings)

    for reduction in ("sum", "none"):
        assert_same(lambda z, r=reduction: ours(z, r), lambda z, r=reduction: theirs(z, r), s)
    if soft:  # F.cross_entropy divides by the first dimension alone
        assert_same(lambda z: ours(z, "mean"), lambda z: theirs(z, "sum") / y.numel(), s)
    else:
        assert_same(lambda z: ours(z, "mean"), lambda z: theirs(z, "mean"), s)


def test_terms_are_the_unweighted_parts_of_one_loss():
    s, t, y = batch()
    y[2] = -100
    for reduction in ("mean", "sum", "none"):
        shared = {"temperature": 3, "label_smoothing": 0.1, "reduction": reduction, "class_weight": WEIGHT}
        loss, ce, kd = DistillLoss(kd_weight=0.7, ce_weight=0.2, **shared).terms(s, t, y)
        torch.testing.assert_close(loss, 0.2 * ce + 0.7 * kd, rtol=1e-14, atol=0)
        torch.testing.assert_close(ce, distill_loss(s, None, y, kd_weight=0, ce_weight=1, **shared).detach())
        torch.testing.assert_close(kd, distill_loss(s, t, y, kd_weight=1, ce_weight=0, **shared).detach())
        # Logged every step: a term that held the graph would keep every step's memory.
        assert not ce.requires_grad
        assert not kd.requires_grad


# ---- derivatives, transforms, copies

FULL = {"label_smoothing": 0.1, "smoothing": "others", "student_temperature": 2.0, "class_weight": WEIGHT}


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_hessian_of_the_kd_term_is_the_softened_covariance(temperature):
    """T² KL has the Hessian diag(p) - p p^T with p the softened student: double backward against a closed form."""
    s, t, y = batch((5,))
    hessian = torch.autograd.functional.hessian(
        lambda z: distill_loss(z, t, y, temperature, kd_weight=1, ce_weight=0, backend="reference"), s.detach()
    )
    p = (s / temperature).softmax(-1).detach()
    torch.testing.assert_close(hessian, p.diag() - p.outer(p), rtol=1e-10, atol=1e-13)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, at its first jvp
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_torch_func_agrees_with_autograd(soft):
    s, t, y = batch()
    if not soft:
        y[3] = -100
    target = draw(6, 5, seed=9).softmax(-1) if soft else y
    s = s.detach()
    loss = DistillLoss(3.0, reduction="sum", **FULL)
    rows = DistillLoss(3.0, reduction="none", **FULL)
    leaf = s.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, t, target), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(s, t, target), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(s, t, target), expected)
    torch.testing.assert_close(torch.func.vmap(loss)(s, t, target), rows(s, t, target))
    _, tangent = torch.func.jvp(lambda z: loss(z, t, target), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(tangent, expected.sum(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_give_the_same_loss(clone):
    s, t, y = batch()
    loss = DistillLoss(3.0, kd_weight=0.3, ce_weight=0.6, **FULL)
    assert torch.equal(clone(loss)(s, t, y), loss(s, t, y))


def test_class_weight_moves_with_the_module_but_is_no_state():
    loss = DistillLoss(class_weight=WEIGHT)
    assert loss.state_dict() == {}
    assert loss.to(torch.float32).class_weight.dtype == torch.float32
    assert loss.to("meta").class_weight.is_meta
    assert list(loss.parameters()) == []


def test_a_setting_may_be_scheduled():
    s, t, y = batch()
    loss = DistillLoss(kd_weight=0.9)
    loss.kd_weight = 0.2
    assert torch.equal(loss(s, t, y), DistillLoss(kd_weight=0.2)(s, t, y))
    with pytest.raises(ValueError, match=r"kd_weight=-1: "):
        loss.kd_weight = -1
    assert loss.kd_weight == 0.2


def test_it_says_what_it_is():
    loss = DistillLoss(2.0, label_smoothing=0.1)
    assert repr(loss) == "DistillLoss(temperature=2.0, label_smoothing=0.1)"
