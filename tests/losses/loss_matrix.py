"""Every combination of DistillLoss's settings, against PyTorch's own losses in float64.

test_matrix.py runs it on the CPU backend, interpreted_triton.py on the Triton kernels. An ignored position has a label,
so there is none among probability targets; all else is crossed with all.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

from kd import DistillLoss

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
HALVES = (BF16, F16)
AXES = {
    "dtype": [F64, F32, BF16, F16],
    "reduction": ["mean", "sum", "none"],
    "smoothing": ["uniform", "others"],
    "label_smoothing": [0.0, 0.1, 0.5],
    "ignored": [False, True],
    "weighted": [False, True],
    "soft": [False, True],
    "temperature": [0.5, 1.0, 2.0, 4.0, 20.0],
    "student_temperature": [None, 1.0, 2.5],
}
NAMES = ("temperature", "student_temperature", "label_smoothing", "smoothing", "reduction")
KD_WEIGHT, CE_WEIGHT = 0.7, 0.4


def combinations(stride=1, **fixed):
    """Every ``stride``-th of those that have these values."""
    axes = AXES | {name: [value] for name, value in fixed.items()}
    every = (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
    return [c for c in every if not (c["soft"] and c["ignored"])][::stride]


def pairs(sample):
    return {(a, str(c[a]), b, str(c[b])) for c in sample for a, b in itertools.combinations(AXES, 2)}


@functools.cache
def batch(n, k, dtype, seed):
    """Student, teacher, labels, probabilities, class weights (one of them 0), upstream."""
    generator = torch.Generator().manual_seed(seed)
    s, t, q = (3 * torch.randn(n, k, generator=generator, dtype=F64) for _ in range(3))
    weight = torch.rand(k, generator=generator, dtype=F64) + 0.5
    weight[k // 2] = 0
    wide = F64 if dtype == F64 else F32
    y = torch.randint(k, (n,), generator=generator)
    upstream = torch.randn(n, generator=generator, dtype=F64).to(wide)
    teacher = (dtype, F32)[seed % 2]
    return s.to(dtype), t.to(teacher), y, q.softmax(-1).to(dtype), weight.to(wide), upstream


def inputs(n, k, seed, c):
    s, t, y, q, weight, upstream = batch(n, k, c["dtype"], seed)
    if c["ignored"]:
        y = y.clone()
        y[1] = -100
    # The fused backends guess 1 / N and 1: the first is right, the others are put right in the backward pass.
    upstream = {"mean": torch.ones_like(upstream[0]), "sum": 0.7 * torch.ones_like(upstream[0])}.get(
        c["reduction"], upstream
    )
    return s, t, q if c["soft"] else y, weight if c["weighted"] else None, upstream


def given(loss, backend, s, t, target, upstream):
    """Loss, ce, kd and the gradient that DistillLoss gives."""
    loss.backend = backend
    leaf = s.detach().requires_grad_()
    values = loss.terms(leaf, t, target)
    assert loss.backend_used == backend
    (gradient,) = torch.autograd.grad(values.loss, leaf, upstream)
    return *(value.detach() for value in values), gradient


def exact(s, t, target, weight, upstream, c):
    """The same by F.cross_entropy and F.kl_div in float64, reduced by hand."""
    leaf, t, upstream = s.double().requires_grad_(), t.double(), upstream.double()
    weight = None if weight is None else weight.double()
    k = leaf.shape[-1]
    eps = c["label_smoothing"] * (k / (k - 1) if c["smoothing"] == "others" else 1)
    kept = torch.ones(len(leaf), dtype=F64) if c["soft"] else (target != -100).double()
    target = target.double() if c["soft"] else target
    ce = F.cross_entropy(leaf, target, weight, label_smoothing=eps, reduction="none")
    temperature = c["temperature"]
    ts = c["student_temperature"] or temperature
    log_s, log_t = F.log_softmax(leaf / ts, -1), F.log_softmax(t / temperature, -1)
    kd = kept * ts**2 * F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    if c["reduction"] != "none":
        count = kept.sum() if c["reduction"] == "mean" else 1
        ce, kd = ce.sum() / count, kd.sum() / count
    loss = CE_WEIGHT * ce + KD_WEIGHT * kd
    (gradient,) = torch.autograd.grad(loss, leaf, upstream)
    return loss.detach(), ce.detach(), kd.detach(), gradient


def largest(x):
    """Of each row, or of the values of all rows."""
    return x.abs().amax(-1, keepdim=True) if x.ndim else x.abs()


def check(backend, n, k, seed, c, halves=None, values=1e-5):
    """Values relative to the largest, gradients to the largest of the row: float64 to 1e-12, float32 to 1e-5.

    ``values`` is another tolerance of values in float32.

    Gradients in a half type: 1.5 times the error of the reference in that type, which computes in float32 and rounds
    once; or what ``halves[dtype]`` allows, a function of the exact gradient.
    """
    s, t, target, weight, upstream = inputs(n, k, seed, c)
    dtype, wide = c["dtype"], upstream.dtype
    loss = DistillLoss(
        **{name: c[name] for name in NAMES}, kd_weight=KD_WEIGHT, ce_weight=CE_WEIGHT, class_weight=weight
    )
    found = given(loss, backend, s, t, target, upstream)
    truth = exact(s, t, target, weight, upstream, c)
    assert [x.dtype for x in found] == [wide, wide, wide, dtype]
    for name, a, b in zip(("loss", "ce", "kd", "gradient"), found, truth, strict=True):
        assert a.shape == b.shape
        tolerance = 1e-12 if dtype == F64 else 1e-5 if name == "gradient" else values
        error, allowed = (a.double() - b).abs(), tolerance * largest(b)
        if name == "gradient" and dtype in HALVES:
            if halves and dtype in halves:
                allowed = halves[dtype](b)
            else:
                theirs = given(loss, "reference", s, t, target, upstream)[3]
                allowed = 1.5 * largest(theirs.double() - b) + 1e-7 * largest(b)
        assert (error <= allowed).all(), (backend, k, seed, c, name, (error / allowed).max().item())
    if c["ignored"]:
        assert torch.equal(found[3][1], torch.zeros_like(found[3][1]))
