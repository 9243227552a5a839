"""What the tests of fourteen pitfalls share: batches, what kd gives for them, and how exact that has to be."""

import math

import pytest
import torch

from kd import DistillLoss

INF, NAN = math.inf, math.nan
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
FULL = {"temperature": 3.0, "student_temperature": 2.0, "label_smoothing": 0.1, "smoothing": "others"}
both = pytest.mark.parametrize("backend", ["cpu", "reference"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def batch(n=6, k=5, dtype=F64, seed=0, scale=3.0):
    """Student, teacher and labels; class weights, one of them 0, are ``weights(k)``."""
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(n, k, generator=generator, dtype=F64) for _ in range(2))
    return s.to(dtype).requires_grad_(), t.to(dtype), torch.randint(k, (n,), generator=generator)


def weights(k):
    w = torch.linspace(0.2, 2.0, k)
    w[k // 2] = 0
    return w


def gradient(value, leaf, upstream=None, **settings):
    return torch.autograd.grad(value, leaf, upstream, **settings)[0]


def results(s, t, target, way=torch.sum, **settings):
    """``terms`` of the loss and the gradient of ``way(loss)``."""
    leaf = s.detach().requires_grad_()
    terms = DistillLoss(**settings).terms(leaf, t, target)
    return *(x if x is None else x.detach() for x in terms), gradient(way(terms.loss), leaf)


def truth(s, t, target, way=torch.sum, **settings):
    """The same from the reference in float64."""
    target = target.double() if target.is_floating_point() else target
    t = None if t is None else t.double()
    return results(s.double(), t, target, way, **settings | {"backend": "reference"})


def assert_rounded_once(actual, exact, floor=0.0):
    """Within half a last digit of the exact gradient, and what the arithmetic inside may be off a row's largest.

    ``floor`` is for rows where p - q cancels for every class: in units of float32's (float64's) last digit.
    """
    dtype, largest = actual.dtype, exact.abs().amax(-1, keepdim=True)
    digit = torch.finfo(dtype).eps / 2 * exact.abs() if dtype in (BF16, F16) else 0
    subnormal = 2.0**-25 if dtype == F16 else 0
    inside = 1e-12 if dtype == F64 else 1e-5
    off = (actual.double() - exact).abs()
    floor *= torch.finfo(F64 if dtype == F64 else F32).eps
    assert (off <= digit + subnormal + inside * largest + floor).all(), off.max()


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
