"""class_weight and class_dim, held against nn.CrossEntropyLoss, which has both."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from kd import DistillLoss, LinearDistillLoss

WEIGHT = torch.tensor([0.3, 2.0, 0.0, 1.5, 0.7], dtype=torch.float64)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(shape=(64,), dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(*shape, 5, generator=generator, dtype=dtype).requires_grad_()
    return s, torch.randint(5, shape, generator=generator)


def both(loss, s):
    return loss.detach(), torch.autograd.grad(loss.sum(), s, retain_graph=True)[0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("ignored", [0, 20, 64])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_pytorchs(reduction, eps, ignored, backend):
    s, y = batch()
    y[:ignored] = -100
    right = nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=eps, reduction=reduction)(s, y)
    settings = {"class_weight": WEIGHT, "label_smoothing": eps, "reduction": reduction, "backend": backend}
    got = DistillLoss(kd_weight=0, ce_weight=1, **settings)(s, None, y)
    if ignored == 64 and reduction == "mean":
        assert got == 0  # PyTorch has 0 / 0
        return
    assert_close(both(got, s), both(right, s), **EXACT)
    head = torch.eye(5, dtype=torch.float64)
    linear = LinearDistillLoss(kd_weight=0, ce_weight=1, **settings)(s, head, y)
    assert_close(both(linear, s), both(right, s), **EXACT)


def test_float16_gradients_of_a_linear_head_survive_the_weights():
    """One divisor for all rows: what the forward pass guesses in float16 follows the weights that it uses."""
    s, y = batch(dtype=torch.float16)
    head, weight = torch.eye(5, dtype=torch.float16), (WEIGHT * 1e-5).float()
    got = LinearDistillLoss(kd_weight=0, ce_weight=1, class_weight=weight)(s, head, y)
    wide = s.detach().float().requires_grad_()
    right = nn.CrossEntropyLoss(weight=weight)(wide, y)
    assert_close(got, right, rtol=1e-3, atol=0)
    assert_close(torch.autograd.grad(got, s)[0].float(), torch.autograd.grad(right, wide)[0], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dim", [1, -3])
def test_class_dim_is_movedim(dim, backend, reduction, soft):
    s, y = batch((2, 3, 4))
    t = s.detach().flip(0)
    target = t.softmax(-1) if soft else y
    settings = {"reduction": reduction, "backend": backend, "label_smoothing": 0.1}
    right = both(DistillLoss(**settings)(s, t, target), s)
    x = s.detach().movedim(-1, 1).contiguous().requires_grad_()
    moved = target.movedim(-1, 1) if soft else target
    value, gradient = both(DistillLoss(class_dim=dim, **settings)(x, t.movedim(-1, 1), moved), x)
    assert_close((value, gradient.movedim(1, -1)), right, **EXACT)


def test_class_dim_copies_no_logits_on_the_reference():
    """Every tensor of their size that is made lies in memory as they do: none was brought into another order."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = set()

    class Strides(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            of_logits = isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
            if of_logits and isinstance(out, torch.Tensor) and out.numel() == 2 * 5 * 30 * 40:
                seen.add((str(func), tuple(sorted(out.stride()))))
            return out

    s, y = batch((2, 30, 40), torch.float32)
    x = s.detach().movedim(-1, 1).contiguous()
    with Strides():
        DistillLoss(class_dim=1, backend="reference")(x, x * 2, y)
    assert not [name for name, _ in seen if "clone" in name or "_to_copy" in name or "contiguous" in name]
    softmax = [stride for name, stride in seen if "log_softmax" in name]
    assert set(softmax) == {tuple(sorted(x.stride()))}


def test_a_wrong_class_dim():
    s, y = batch()
    with pytest.raises(ValueError, match="class_dim=2: must be a dimension of student_logits"):
        DistillLoss(class_dim=2)(s, s.detach(), y)
    with pytest.raises(ValueError, match=r"target has shape \(64,\): must be"):
        DistillLoss(class_dim=0)(s, s.detach(), y)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_without_labels(backend):
    s, y = batch((3, 4))
    t = s.detach().flip(0)
    settings = {"ce_weight": 0, "backend": backend}
    for reduction in ("mean", "sum", "none"):
        loss = DistillLoss(reduction=reduction, **settings)
        assert torch.equal(loss(s, t), loss(s, t, y))
    with pytest.raises(ValueError, match="target=None: must be given with ce_weight"):
        DistillLoss(backend=backend)(s, t)
