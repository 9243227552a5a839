"""The ends of what DistillLoss takes: its settings at the ends of their ranges, the largest logits, infinities.

test_extremes.py runs this on the CPU backend and the reference, interpreted_loss.py on the Triton kernels. What is
right is computed in float64 from softmaxes, by the formulas of DistillLoss's docstring, and shares no code with kd.
"""

import itertools
import math

import torch

from kd import DistillLoss, LinearDistillLoss

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan
LARGEST = torch.finfo(F32).max
BELOW_1 = 1 - 2.0**-53
TEMPERATURES = (0.001, 1.0, 4.0, 1000.0)
# One setting at an end of its range, and all of them. A mass just below 1 is the uniform distribution.
SETTINGS = {
    **{f"T {t:g}, Ts {ts}": {"temperature": t, "student_temperature": ts}
       for t, ts in itertools.product((0.001, 1000), (None, 0.001, 1.0, 1000))},
    **{f"{name} {value:g}": {name: value}
       for name in ("kd_weight", "ce_weight") for value in (1e-300, 1e-40, 1e-30, 10**6)},
    **{f"{name} eps {value!r}": {"label_smoothing": value, "smoothing": name}
       for name in ("uniform", "others") for value in (1e-300, 1e-40, 1e-30, 1 - 1e-7, BELOW_1)},
    **{f"class weights {value:g}": {"class_weight": value} for value in (1e-300, 1e-40, 1e-30, 1e6)},
    "all at the top": {"temperature": 1000, "kd_weight": 10**6, "ce_weight": 10**6, "label_smoothing": BELOW_1,
                       "class_weight": 1e6},
    "all at the bottom": {"temperature": 0.001, "kd_weight": 1e-300, "ce_weight": 1e-300, "label_smoothing": 1e-300,
                          "class_weight": 1e-300},
}  # fmt: skip


def draw(n, k, dtype, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(n, k, generator=generator, dtype=F64) for _ in range(2))
    return s.to(dtype), t.to(dtype), torch.randint(k, (n,), generator=generator)


def exact(s, t, y, temperature=4.0, student_temperature=None, kd_weight=0.9, ce_weight=0.1, label_smoothing=0.0,
          smoothing="uniform", class_weight=None):  # fmt: skip
    """Loss (n,) and its gradient (n, k), in float64, by the formulas.

    A class that the teacher gives 0, in the dtype of the loss, is left out of KL, and a class without a share out of
    the cross entropy: there the other factor may be infinite.
    """
    ts, k, zero = student_temperature or temperature, s.shape[-1], torch.float64 if s.dtype == F64 else F32
    s, t = s.double(), t.double()
    mass = label_smoothing * k / (k - 1) if smoothing == "others" else label_smoothing
    share = (1 - mass) * torch.nn.functional.one_hot(y, k).double() + mass / k
    share = share * (1.0 if class_weight is None else class_weight)
    share = share.where(share >= 1e-30, 0)
    p, q = (t / temperature).softmax(-1), (s / ts).softmax(-1)
    nll = -s.log_softmax(-1).where(share > 0, 0)
    gap = ((t / temperature).log_softmax(-1) - (s / ts).log_softmax(-1)).where((p.to(zero) > 0) | p.isnan(), 0)
    ce, kd = (share * nll).sum(-1), ts**2 * (p * gap).sum(-1)
    gradient = ce_weight * (share.sum(-1, keepdim=True) * s.softmax(-1) - share) + kd_weight * ts * (q - p)
    terms = [w * x for w, x in ((ce_weight, ce), (kd_weight, kd)) if w >= 1e-30]
    return sum(terms, torch.zeros(len(s), dtype=F64)), gradient


def given(backend, s, t, y, by_head=False, class_weight=None, **settings):
    """The same from kd; ``class_weight`` is one number for all classes."""
    weight = None if class_weight is None else torch.full((s.shape[-1],), class_weight, dtype=F64)
    kind = LinearDistillLoss if by_head else DistillLoss
    loss = kind(backend=backend, reduction="none", class_weight=weight, **settings)
    leaf = s.detach().clone().requires_grad_()
    value = loss(leaf, torch.eye(s.shape[-1], dtype=s.dtype), y, teacher_logits=t) if by_head else loss(leaf, t, y)
    assert loss.backend_used == backend
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach().double(), gradient


def assert_gradient(found, right, steepness):
    """To float32's rounding, of softmaxes times ``steepness`` too, and the dtype's; inf is what that cannot hold."""
    right = right.to(found.dtype).double() if found.dtype == F16 else right
    eps = torch.finfo(F64 if found.dtype == F64 else F32).eps
    digit = torch.finfo(found.dtype).eps if found.dtype in (BF16, F16) else eps
    kept, found = right.isfinite(), found.double()
    torch.testing.assert_close(found.where(~kept, 0), right.where(~kept, 0), equal_nan=True)
    allowed = digit * right.abs() + 16 * eps * right.abs().amax(-1, keepdim=True) + 4 * eps * steepness + 2.0**-24
    assert ((found - right).abs() <= allowed)[kept].all()


def settings_at_their_ends(backend, dtype, name, sizes=(5, 37), ways=(False, True)):
    settings = SETTINGS[name]
    temperature = settings.get("temperature", 4.0)
    ts = settings.get("student_temperature") or temperature
    # In float16 gradients overflow, and inf times a 0 of the head is nan, as it is in F.linear.
    for k, by_head in itertools.product(sizes, ways if dtype != F16 else (False,)):
        s, t, y = draw(4, k, dtype)
        value, gradient = given(backend, s, t, y, by_head, **settings)
        right, slope = exact(s, t, y, **settings)
        # What float32 loses of KL at a high temperature is in kd.losses.ranges.
        lost = torch.finfo(F64 if dtype == F64 else F32).eps * 4 * ts**2 * settings.get("kd_weight", 0.9)
        assert value.isfinite().all()
        assert ((value - right).abs() <= (1e-12 if dtype == F64 else 1e-5) * right.abs().max() + lost).all(), name
        assert_gradient(gradient, slope, ts * settings.get("kd_weight", 0.9))


def largest_logits(backend, dtype, m, temperature, repeats=(1, 10)):
    """Up to 1e20 the loss is right, beyond it is right or, where float32 cannot hold it or a part of it, inf."""
    rows = torch.tensor([[1, -1, 0, 0.5], [-1, 1, 0, 0], [1, 1, 1, 1], [-1, -1, -1, -1], [-1, 0, 0, 0], [0, 1, -1, 1]])
    for times, (label, eps) in itertools.product(repeats, ((0, 0.0), (1, 0.1), (2, 0.1))):
        s = (rows.double() * m).to(dtype).repeat(1, times)
        y = torch.full((len(s),), label)
        settings = {"temperature": temperature, "label_smoothing": eps}
        for t in (s, s.flip(0), s.roll(1, -1), torch.arange(4.0).to(dtype).repeat(len(s), times)):
            value, gradient = given(backend, s, t, y, **settings)
            right, slope = exact(s, t, y, **settings)
            lost = 4e-7 * temperature**2  # as above
            right_or_inf = (value - right).abs() <= 1e-5 * right.abs() + lost
            assert (right_or_inf | ((value == INF) & (m > 1e20))).all(), (label, eps, value, right)
            assert_gradient(gradient, slope, temperature)


def infinities(backend, dtype, temperature, sizes=(4, 37)):
    """-inf is a masked class; +inf and nan make their row nan, and no other."""
    for k, eps, where in itertools.product(sizes, (0.0, 1e-40, 0.1), (2, slice(2, 4), slice(1, None, 2))):
        s, t, _ = draw(6, k, dtype)
        y = torch.zeros(6, dtype=torch.int64)
        y[1] = 3  # masked, or not
        s[0, where] = t[0, where] = s[1, where] = t[1, where] = -INF
        s[2, where] = -INF  # KL is inf, its gradient is not
        t[3, where] = -INF
        s[4, where] = NAN if k == 4 else INF
        settings = {"temperature": temperature, "label_smoothing": eps}
        value, gradient = given(backend, s, t, y, **settings)
        right, slope = exact(s, t, y, **settings)
        assert value[4].isnan()
        assert gradient[4].isnan().all()
        rest = [0, 1, 2, 3, 5]
        torch.testing.assert_close(value[rest], right[rest], rtol=1e-5, atol=1e-5 + 4e-7 * temperature**2)
        assert_gradient(gradient[rest], slope[rest], temperature)
        t[5, where] = NAN if k == 4 else INF
        assert given(backend, s, t, y, **settings)[0][5].isnan()
