"""What every backend of DistillLoss must do, checked against the loss's formulas in float64.

test_backends.py runs this on the CPU kernel and on the reference, interpreted_triton.py on the Triton kernels. Shapes:
n rows, k classes. ``exact`` shares no code with kd.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from kd import DistillLoss, LinearDistillLoss

INF, NAN = math.inf, math.nan
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DTYPES = (F64, F32, BF16, F16)
LARGEST = torch.finfo(F32).max
FULL = {"temperature": 3.0, "student_temperature": 2.0, "label_smoothing": 0.1, "smoothing": "others"}


def draw(*shape, seed=0, scale=3.0, dtype=F64):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)).to(dtype)


def batch(n=6, k=5, dtype=F64, seed=0, scale=3.0):
    """Student, teacher and labels."""
    y = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    return draw(n, k, seed=seed, scale=scale, dtype=dtype), draw(n, k, seed=seed + 1, scale=scale, dtype=dtype), y


def value_and_grad(loss, logits):
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def assert_same(ours, theirs, logits, tolerance=1e-12):
    """Value and gradient of two functions of the student's logits."""
    for a, b in zip(value_and_grad(ours, logits), value_and_grad(theirs, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def class_weights(k):
    """One of them is 0."""
    weight = torch.linspace(0.2, 2.0, k)
    weight[k // 2] = 0
    return weight


def exact(
    s,
    t,
    target,
    *,
    temperature=4.0,
    student_temperature=None,
    kd_weight=0.9,
    ce_weight=0.1,
    label_smoothing=0.0,
    smoothing="uniform",
    class_weight=None,
    ignore_index=-100,
):
    """Loss, ce and kd (n,) and the gradient of the loss (n, k), by the formulas of DistillLoss's docstring.

    A class that the teacher gives 0, in the dtype of the loss, is left out of KL, and a class without a share out of
    the cross entropy: there the other factor may be infinite. Weights and masses below 1e-30 are 0.
    """
    k, ts, wide = s.shape[-1], student_temperature or temperature, F64 if s.dtype == F64 else F32
    kept = torch.ones(len(s), dtype=torch.bool) if target.is_floating_point() else target != ignore_index
    s, t = (None if x is None else x.double().where(kept[:, None], 0) for x in (s, t))
    q = target.double() if target.is_floating_point() else F.one_hot(target.where(kept, 0), k).double()
    mass = label_smoothing * (k / (k - 1) if smoothing == "others" and k > 1 else 1) * (smoothing != "others" or k > 1)
    share = ((1 - mass) * q + mass / k) * (1 if class_weight is None else class_weight.double())
    share = share.where(share.abs() >= 1e-30, 0)
    ce = kd = torch.zeros(len(s), dtype=F64)
    gradient = torch.zeros_like(s)
    if ce_weight >= 1e-30:
        ce = (share * -s.log_softmax(-1).where(share != 0, 0)).sum(-1)
        gradient = gradient + ce_weight * (share.sum(-1, keepdim=True) * s.softmax(-1) - share)
    if kd_weight >= 1e-30:
        log_p, log_q = (t / temperature).log_softmax(-1), (s / ts).log_softmax(-1)
        p = log_p.exp()
        kd = ts**2 * (p * (log_p - log_q).where((p.to(wide) > 0) | p.isnan(), 0)).sum(-1)
        gradient = gradient + kd_weight * ts * (log_q.exp() - p)
    loss = sum(w * x for w, x in ((ce_weight, ce), (kd_weight, kd)) if w >= 1e-30) + torch.zeros_like(ce)
    return [x.where(kept if x.ndim == 1 else kept[:, None], 0) for x in (loss, ce, kd, gradient)]


def results(backend, s, t, target, way=torch.sum, **settings):
    """Loss, ce, kd and the gradient of ``way(loss)`` that DistillLoss gives, under reduction "none"."""
    loss = DistillLoss(backend=backend, **{"reduction": "none", **settings})
    leaf = s.detach().requires_grad_()
    terms = loss.terms(leaf, t, target)
    assert loss.backend_used == backend
    values = [torch.zeros_like(terms.loss) if term is None else term for term in terms]
    return *(value.detach() for value in values), torch.autograd.grad(way(terms.loss), leaf)[0]


def compare(backend, s, t, target, *, upstream=None, reduction="none", **settings):
    """Values and gradient against ``exact``: to 1e-12 in float64, 1e-5 in float32, gradients in halves rounded once."""
    wide = F64 if s.dtype == F64 else F32
    kept = target != settings.get("ignore_index", -100)
    count = 1 if target.is_floating_point() else kept.sum().clamp(min=1)
    weight = settings.get("class_weight")
    if reduction == "mean" and weight is not None and not target.is_floating_point():
        total = weight.double()[target[kept]].sum()  # the weighted mean of F.cross_entropy
        weight = weight.double() * (count / total if total > 0 else 0)
    right = exact(s, t, target, **settings | {"class_weight": weight})
    up = torch.ones(len(s)) if upstream is None else upstream
    count = {"mean": len(s) if target.is_floating_point() else count}.get(reduction, 1)
    if reduction != "none":
        right[:3] = [value.sum() / count for value in right[:3]]
        up = up[:1].expand(len(s))
    found = results(backend, s, t, target, lambda v: (v * up.to(v.dtype)[: v.numel()].view_as(v)).sum(),
                    reduction=reduction, **settings)  # fmt: skip
    assert [x.dtype for x in found] == [wide, wide, wide, s.dtype]
    ts = settings.get("student_temperature") or settings.get("temperature", 4.0)
    kd_weight, eps = settings.get("kd_weight", 0.9), torch.finfo(wide).eps
    relative = 1e-12 if wide == F64 else 1e-5
    for name, a, b, factor in zip(("loss", "ce", "kd"), found, right, (kd_weight, 0, 1), strict=False):
        scale = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
        lost = 4 * eps * ts**2 * factor * (len(s) if reduction == "sum" else 1)  # what a KL loses at a temperature
        torch.testing.assert_close(
            a.double(),
            b,
            rtol=relative,
            atol=relative * scale + lost + 1e-29,
            equal_nan=True,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    slope = right[3] * up.double()[:, None] / count
    heaviest = 1.0 if weight is None else weight.max().item()
    steepness = (
        (ts * kd_weight + settings.get("ce_weight", 0.1) * heaviest) * up.double().abs().max().item() / float(count)
    )
    assert_gradient(found[3], slope, steepness, digits_of(backend, s.dtype))


def digits_of(backend, dtype):
    """How many last digits a stored gradient may be off: Triton's interpreter truncates bfloat16, a GPU rounds."""
    return 1.0 if (backend, dtype) == ("triton", BF16) else 0.5


def assert_gradient(found, right, steepness=0.0, digits=0.5):
    """To ``digits`` last digits of a half type and the rounding of float32 (float64) inside; too large is inf.

    Inside, softmaxes that are multiplied by up to ``steepness`` are subtracted from each other.
    """
    dtype = found.dtype
    if dtype == F16:
        right = torch.where(right.abs() < 65520, right, right.sign() * INF)
    eps = torch.finfo(F64 if dtype == F64 else F32).eps
    digit = digits * torch.finfo(dtype).eps if dtype in (BF16, F16) else eps
    finite, found = right.isfinite(), found.double()
    torch.testing.assert_close(found.where(~finite, 0), right.where(~finite, 0), equal_nan=True)
    row = right.where(finite, 0).abs().amax(-1, keepdim=True)
    allowed = digit * right.abs() + (1e-12 if dtype == F64 else 5e-6) * row + 4 * eps * steepness
    allowed = allowed + (2.0**-25 if dtype == F16 else 0)
    assert ((found - right).abs() <= allowed)[finite].all(), ((found - right).abs() - allowed)[finite].max()


# ---- any settings

SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.5, 1.0, 2.0, 3.0, 4.0, 8.0, 20.0]),
        "student_temperature": st.sampled_from([None, 1.0, 2.5]),
        "label_smoothing": st.sampled_from([0.0, 0.1, 0.5]),
        "smoothing": st.sampled_from(["uniform", "others"]),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "class_weight": st.booleans(),
        "weights": st.sampled_from([(0.9, 0.4), (0.0, 1.0), (1.3, 0.0)]),
        "soft": st.booleans(),
        "ignored": st.booleans(),
        "teacher_dtype": st.sampled_from(DTYPES),
        "seed": st.integers(0, 99),
    }
)


def any_settings(backend, dtype, n, k, drawn):
    """One drawn combination: labels or probabilities, weights, an ignored row, a teacher of another dtype."""
    drawn = dict(drawn)
    soft, ignored, teacher, seed = (drawn.pop(name) for name in ("soft", "ignored", "teacher_dtype", "seed"))
    drawn["kd_weight"], drawn["ce_weight"] = drawn.pop("weights")
    drawn["class_weight"] = class_weights(k) if drawn["class_weight"] else None
    s, t, target = batch(n, k, dtype, seed)
    if soft:
        target = draw(n, k, seed=seed + 2).softmax(-1).to(dtype)
    elif ignored:
        target[n // 2] = -100
    compare(backend, s, t.to(teacher), target, upstream=draw(n, seed=seed + 3, scale=1.0), **drawn)


# ---- upstream gradients, graphs, memory


def upstream_gradients(backend, dtype, n=7, k=5):
    """Any upstream gradient, of any stride, also where the logits are a function of the leaf."""
    s, t, y = batch(n, k, dtype)
    y[2] = -100
    settings = {"class_weight": class_weights(k), **FULL}
    slope = exact(s, t, y, **settings)[3]
    loss = results(backend, s, t, y, **settings)[0].double()
    strided = draw(2 * n, seed=1)[::2]
    one = F.one_hot(torch.tensor(3), n).double()
    ways = {
        "zero": (lambda v: 0 * v.sum(), torch.zeros(n)),
        "loss scale": (lambda v: 2.0**10 * v.sum(), torch.full((n,), 2.0**10)),
        "squared": (lambda v: v.square().sum(), 2 * loss),
        "one row": (lambda v: v[3], one),
        "strided": (lambda v: (v * strided.to(v.dtype)).sum(), strided),
        "expanded": (lambda v: (v * strided[:1].expand(n).to(v.dtype)).sum(), strided[:1].expand(n)),
    }
    for way, up in ways.values():
        right = slope * up.double()[:, None]
        steepness = 4 * up.abs().max().item()
        assert_gradient(results(backend, s, t, y, way, **settings)[3], right, steepness, digits_of(backend, dtype))
    leaf = s.double().requires_grad_()
    tripled = DistillLoss(backend=backend, reduction="none", **settings)(3 * leaf, t, y)
    (found,) = torch.autograd.grad(tripled, leaf, strided)
    right = 3 * exact(3 * leaf.detach(), t, y, **settings)[3] * strided[:, None]
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)


def graphs(backend, dtype, k=5):
    """Inputs keep bits and versions; a retained graph repeats its bits; a second derivative is right or an error."""
    s, t, y = batch(6, k, dtype)
    soft, weight = t.double().softmax(-1).to(dtype), class_weights(k)
    s.requires_grad_()
    inputs = s, t, y, weight, soft
    before = [(x.detach().clone(), x._version) for x in inputs]
    for target, scale, reduction in ((y, 1.0, "mean"), (y, 0.3, "none"), (soft, 0.3, "mean")):
        loss = DistillLoss(class_weight=weight, backend=backend, reduction=reduction, **FULL)
        value = scale * loss(s, t, target).sum()
        first = torch.autograd.grad(value, s, retain_graph=True)[0]
        kept = first.clone()
        first.zero_()  # the caller owns it and may write to it
        assert torch.equal(torch.autograd.grad(value, s)[0], kept)
        again = torch.autograd.grad(scale * loss(s, t, target).sum(), s)[0]
        assert torch.equal(again, kept)
    for x, (value, version) in zip(inputs, before, strict=True):
        assert torch.equal(x.detach(), value)
        assert x._version == version
    if backend == "reference":
        assert dtype != F64 or torch.autograd.gradgradcheck(lambda z: loss(z, t, soft), s)
        return
    slope = torch.autograd.grad(loss(s, t, soft).sum(), s, create_graph=True)[0]
    assert slope.requires_grad
    with pytest.raises(RuntimeError, match=r"has no second derivative: use DistillLoss\(backend='reference'\)"):
        slope.square().sum().backward()


# ---- rows that are ignored, masked, extreme or broken


def ignored_rows(backend, dtype, sizes=(5, 1500)):
    """Exactly 0 in value and gradient, whatever such a row holds; of nothing else the loss is 0."""
    for k, garbage, ignore_index in zip((sizes[0], *sizes), (NAN, INF, -INF), (-100, 3, -(2**44)), strict=True):
        s, t, y = batch(6, k, dtype)
        y[y == ignore_index] = 0
        y[0] = y[4] = ignore_index  # an address that far off would end the process
        s[4] = t[4] = garbage
        settings = {"class_weight": class_weights(k), "ignore_index": ignore_index, **FULL}
        compare(backend, s, t, y, **settings)
        for x in results(backend, s, t, y, **settings):
            assert torch.equal(x[[0, 4]], torch.zeros_like(x[[0, 4]]))
    s, t, y = batch(4, 5, dtype)
    ignored, soft = torch.full_like(y, -100), t.double().softmax(-1).to(dtype)
    for inputs, settings in (
        ((s[:0], t[:0], y[:0]), FULL),
        ((s[:0], t[:0], soft[:0]), FULL),
        ((s, t, ignored), FULL),
        ((s * NAN, t, ignored), {"teacher_smoothing": 0.1}),
        ((s * NAN, t, y), {"kd_weight": 0.0, "ce_weight": 0.0}),
        ((s, None, soft), {"kd_weight": 0.0, "ce_weight": 0.0}),
        ((s, t, y), {"kd_weight": 0.0, "ce_weight": 1.0, "class_weight": torch.zeros(5)}),
    ):
        for reduction in ("mean", "sum", "none"):
            loss, *_, gradient = results(backend, *inputs, lambda v: 0.3 * v.sum(), reduction=reduction, **settings)
            assert loss.shape == (inputs[0].shape[:1] if reduction == "none" else ())
            assert (loss == 0).all()
            assert torch.equal(gradient, torch.zeros_like(inputs[0]))


TEMPERATURES = ({}, {"student_temperature": 1.0}, {"temperature": 0.5}, {"temperature": 3.0})


def masked_classes(backend, dtype, sizes=(9, 3000), temperatures=TEMPERATURES, masks=4):
    """-inf in student and teacher, also in whole blocks of a kernel: as if these classes were not there."""
    for k in sizes:
        for masked in (slice(0, k // 2), slice(3, None, 2), slice(k // 2, k), slice(1, 2))[:masks]:
            s, t, _ = batch(3, k, dtype)
            s[:, masked], t[:, masked] = -INF, -INF
            y, w = s.argmax(-1), class_weights(k)
            for settings in temperatures:
                compare(backend, s, t, y, **settings)
                compare(backend, s, t, F.one_hot(y, k).to(dtype), **settings)
            w[masked] = 0
            compare(backend, s, t, y, class_weight=w, label_smoothing=0.1)
            smoothed = results(backend, s, t, y, label_smoothing=0.1)
            assert (smoothed[1] == INF).all()  # smoothing wants the masked classes, as in F.cross_entropy
            assert smoothed[2].isfinite().all()
            compare(backend, s, draw(3, k, seed=5, dtype=dtype), y, temperature=20.0)  # KL is inf, its gradient is not
            compare(backend, draw(3, k, seed=5, dtype=dtype), t, y)
            if dtype == F32:  # masked by the lowest finite number: over a temperature below 1.44 it is -inf in base 2
                low = [x.masked_fill(x == -INF, torch.finfo(F32).min) for x in (s, t)]
                found, right = results(backend, *low, y, temperature=1.0), results(backend, s, t, y, temperature=1.0)
                for a, b in zip(found, right, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def dead_terms(backend, dtype):
    """A term of weight 0 is not looked at: 0 * inf would be nan."""
    s, t, y = batch(4, 5, dtype)
    without = results(backend, s, None, y, kd_weight=0.0)
    for a, b in zip(results(backend, s, torch.full_like(t, NAN), y, kd_weight=0.0), without, strict=True):
        assert torch.equal(a, b)
    s[torch.arange(4), y] = t[torch.arange(4), y] = -INF  # their cross entropy is inf
    compare(backend, s, t, y, ce_weight=0.0, label_smoothing=0.1)
    terms = DistillLoss(ce_weight=0.0, backend=backend).terms(s, t, y)
    assert terms.ce is None
    assert DistillLoss(kd_weight=0.0, backend=backend).terms(s, None, y).kd is None


def broken_rows(backend, dtype, sizes=(5, 3000)):
    """nan, +inf, or nothing but -inf make their row nan, and no other."""
    for k, (soft, broken) in itertools.product(sizes, ((False, NAN), (True, INF))):
        for which, where in ((0, k - 2), (1, 0), (0, slice(None))):
            s, t, y = batch(4, k, dtype)
            (s, t)[which][2, where] = broken if where != slice(None) else -INF
            target = draw(4, k, seed=5).softmax(-1) if soft else y
            found = results(backend, s, t, target, label_smoothing=0.1)
            assert found[0].isnan().tolist() == [False, False, True, False]
            assert found[3].isnan().all(-1).tolist() == [False, False, True, False]
            assert found[3][[0, 1, 3]].isfinite().all()


ENDS = [
    *({"temperature": t, "student_temperature": ts} for t in (0.001, 1000) for ts in (None, 0.001, 1.0, 1000)),
    *({name: value} for name in ("kd_weight", "ce_weight") for value in (1e-300, 1e-30, 10**6)),
    *({"label_smoothing": eps, "smoothing": name}
      for name in ("uniform", "others") for eps in (1e-300, 1e-30, 1 - 1e-7, 1 - 2.0**-53)),
    *({"class_weight": torch.full((5,), value, dtype=F64)} for value in (1e-300, 1e-30, 1e6)),
    {"temperature": 1000, "kd_weight": 10**6, "ce_weight": 10**6, "label_smoothing": 1 - 2.0**-53,
     "class_weight": torch.full((5,), 1e6, dtype=F64)},
    {"temperature": 0.001, "kd_weight": 1e-300, "ce_weight": 1e-300, "label_smoothing": 1e-300},
]  # fmt: skip


def settings_at_their_ends(backend, dtype):
    for settings in ENDS:
        s, t, y = batch(4, 5, dtype)
        compare(backend, s, t, y, **settings)
        if dtype not in (F16, BF16):  # there gradients overflow or are rounded twice
            head = LinearDistillLoss(backend=backend, reduction="none", **settings)
            value = head(s, torch.eye(5, dtype=dtype), y, teacher_logits=t)
            torch.testing.assert_close(value, results(backend, s, t, y, **settings)[0], rtol=1e-5, atol=1e-6)


def largest_logits(backend, dtype, times=10, temperatures=(0.001, 1.0, 4.0, 1000.0)):
    """Up to 1e20 the loss is right; beyond it is right or, where float32 cannot hold it, inf. The gradient is right."""
    rows = torch.tensor([[1, -1, 0, 0.5], [-1, 1, 0, 0], [1, 1, 1, 1], [-1, -1, -1, -1], [-1, 0, 0, 0], [0, 1, -1, 1]])
    largest = {F16: (65504,), F32: (1e4, 1e20, LARGEST), BF16: (1e20, 3e38), F64: (1e20, 1e39, 1e300)}[dtype]
    labels = ((0, 0.0), (1, 0.1), (2, 0.1))
    for m, (label, eps), temperature in itertools.product(largest, labels, temperatures):
        s = (rows.double() * m).to(dtype).repeat(1, times)
        y = torch.full((len(s),), label)
        settings = {"temperature": temperature, "label_smoothing": eps}
        for t in (s, s.roll(1, -1), torch.arange(4.0).to(dtype).repeat(len(s), times)):
            value, *_, gradient = results(backend, s, t, y, **settings)
            right, *_, slope = exact(s, t, y, **settings)
            close = (value - right).abs() <= 1e-5 * right.abs() + 4e-7 * temperature**2
            assert (close | ((value == INF) & (m > 1e20))).all(), (m, label, eps, temperature, value, right)
            assert_gradient(gradient, slope, temperature, digits_of(backend, dtype))


def confident_half_rows(backend, dtype, n=64):
    """p - 1 cancels: computed in a half type, all of the label's gradient can be lost."""
    for p, temperature, kd_weight in itertools.product((0.99, 0.999), (1.0, 3.0), (0.0, 1.0)):
        s, t, _ = batch(n, 10, scale=0.5)
        y = torch.arange(n) % 10
        s = (s + F.one_hot(y, 10) * math.log(9 * p / (1 - p))).to(dtype)
        t = (s.double() + t).to(dtype)
        settings = {"temperature": temperature, "ce_weight": 1.0, "kd_weight": kd_weight}
        found, right = results(backend, s, t, y, **settings)[3], exact(s, t, y, **settings)[3]
        digits = digits_of(backend, dtype)
        # float32's own error of a difference of numbers near 1 comes on top.
        off = (found.double() - right).abs() - digits * torch.finfo(dtype).eps * right.abs()
        assert (off <= 6e-7).all(), (p, temperature, kd_weight, off.max())


# ---- sizes and layouts


def any_size(backend, dtype, sizes=((3, 1), (1, 2), (3, 16), (5, 17), (2, 1025), (1, 4097), (130, 5))):
    for n, k in sizes:
        s, t, y = batch(n, k, dtype)
        compare(backend, s, t, y, **FULL)
        compare(backend, s, t, draw(n, k, seed=3).softmax(-1), class_weight=class_weights(k) + 0.1, **FULL)


def any_layout(backend, dtype, k=1100):
    s, t, y = batch(4, k, dtype)
    shifted = torch.cat([s.new_zeros(4, 1), s], 1)[:, 1:]  # rows one element further apart, and not aligned
    soft = t[:1].double().softmax(-1).expand(4, -1)
    for student, teacher in (
        (s.t().contiguous().t(), t.t().contiguous().t()),
        (shifted, t[:1].expand(4, -1)),
        (s.repeat(1, 2)[:, :k], t.repeat_interleave(2, 1)[:, ::2]),
    ):
        for target in (y.repeat_interleave(3)[::3], soft):
            weight = class_weights(k).repeat_interleave(2)[::2]
            strided = results(backend, student, teacher, target, class_weight=weight, **FULL)
            plain = results(backend, *(x.contiguous() for x in (student, teacher, target)), class_weight=weight, **FULL)
            for a, b in zip(strided, plain, strict=True):
                torch.testing.assert_close(a, b)
                assert backend != "cpu" or torch.equal(a, b)


def offsets_beyond_32_bits(backend, dtype):
    """2^31 elements to the last row, in memory of which only the rows are touched."""
    s, t, y = batch(3, 21, dtype)
    expected = results(backend, s, t, y)
    for which in (0, 1):
        inputs = [s, t]
        far = torch.empty(2**31 + 64, dtype=dtype).as_strided((3, 21), (2**30, 1))
        far.copy_(inputs[which])
        inputs[which] = far
        for a, b in zip(results(backend, *inputs, y), expected, strict=True):
            assert torch.equal(a, b)
