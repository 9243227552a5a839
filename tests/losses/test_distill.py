"""DistillLoss against hand values, PyTorch's own losses, the published KD code's numbers, and float64."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kd import DistillLoss, distill_loss

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "kd.json").read_text())["cases"]
INF = math.inf


def draw(*shape, seed=0, scale=3.0, dtype=torch.float64):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def batch(shape=(6, 5), seed=0, dtype=torch.float64):
    s, t = draw(*shape, seed=seed, dtype=dtype), draw(*shape, seed=seed + 1, dtype=dtype)
    labels = torch.randint(shape[-1], shape[:-1], generator=torch.Generator().manual_seed(seed))
    return s.requires_grad_(), t, labels


def value_and_grad(loss, logits):
    value = loss(logits)
    return value.detach(), torch.autograd.grad(value.sum(), logits)[0]


def assert_same(ours, theirs, logits, tolerance=1e-12):
    """Value and gradient of two functions of the student's logits."""
    for a, b in zip(value_and_grad(ours, logits), value_and_grad(theirs, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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


def test_default_weights_and_temperature():
    s, t, y = batch()
    kl = F.kl_div(F.log_softmax(s / 4, -1), F.softmax(t / 4, -1), reduction="batchmean")
    torch.testing.assert_close(distill_loss(s, t, y), 0.1 * F.cross_entropy(s, y) + 0.9 * 16 * kl)
    torch.testing.assert_close(DistillLoss()(s, t, y), 0.1 * F.cross_entropy(s, y) + 0.9 * 16 * kl)


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


@pytest.mark.parametrize("student_temperature", [1.0, 2.5])
def test_the_student_may_have_its_own_temperature(student_temperature):
    s, t, y = batch()
    ts = student_temperature

    def theirs(z):
        return ts**2 * F.kl_div(F.log_softmax(z / ts, -1), F.softmax(t / 5, -1), reduction="batchmean")

    def ours(z):
        return distill_loss(z, t, y, 5, kd_weight=1, ce_weight=0, student_temperature=ts)

    assert_same(ours, theirs, s)
    grad = ts * (F.softmax(s / ts, -1) - F.softmax(t / 5, -1)) / len(s)
    torch.testing.assert_close(value_and_grad(ours, s)[1], grad.detach(), rtol=1e-12, atol=1e-15)


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
    kept = y.numel() if soft else (y != -100).sum()
    assert_same(lambda z: ours(z, "mean"), lambda z: theirs(z, "sum") / kept, s)
    if class_weight is None and not (soft and s.ndim > 2):
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


def test_a_term_of_weight_zero_is_none_and_not_computed():
    s, t, y = batch()
    nowhere = torch.full_like(t, math.nan)
    assert DistillLoss(kd_weight=0.0).terms(s, nowhere, y).kd is None
    assert torch.equal(DistillLoss(kd_weight=0.0)(s, nowhere, y), DistillLoss(kd_weight=0)(s, None, y))
    masked = s.detach().clone()
    masked[0, y[0]] = -INF  # its cross entropy is inf, and 0 * inf nan
    terms = DistillLoss(ce_weight=0.0).terms(masked, masked, y)
    assert terms.ce is None
    assert terms.loss == 0


def test_both_weights_zero_give_zero_with_a_graph():
    s, _, y = batch()
    s.data[0, 0] = INF
    for reduction in ("mean", "sum", "none"):
        value, grad = value_and_grad(
            lambda z, r=reduction: distill_loss(z, None, y, kd_weight=0, ce_weight=0, reduction=r), s
        )
        assert value.abs().max() == 0
        assert torch.equal(grad, torch.zeros_like(s))


# ---- ignored, empty, masked and extreme positions


@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
def test_ignored_positions_are_as_if_removed(ignore_index):
    s, t, _ = batch()
    y = torch.tensor([0, ignore_index, 1, 4, ignore_index, 3])
    kept = y != ignore_index
    settings = {"temperature": 2.0, "label_smoothing": 0.1, "class_weight": WEIGHT}

    def ours(z):
        return distill_loss(z, t, y, ignore_index=ignore_index, **settings)

    assert_same(ours, lambda z: distill_loss(z[kept], t[kept], y[kept], **settings), s)


@pytest.mark.parametrize("garbage", [math.nan, INF, -INF])
@pytest.mark.parametrize("student_temperature", [None, 1.0])
def test_an_ignored_position_gives_exactly_zero_whatever_is_in_it(garbage, student_temperature):
    s, t, y = batch()
    s.data[1], t[1], y[1] = garbage, garbage, -100
    loss = DistillLoss(label_smoothing=0.1, student_temperature=student_temperature, reduction="none")
    value, grad = value_and_grad(lambda z: loss(z, t, y), s)
    assert value[1] == 0
    assert torch.equal(grad[1], torch.zeros(5, dtype=torch.float64))
    assert value[y != -100].isfinite().all()
    assert grad.isfinite().all()
    assert grad[0].abs().max() > 0


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 5)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from_is_zero_with_a_graph(shape, reduction):
    s, t = draw(*shape).requires_grad_(), draw(*shape, seed=1)
    targets = [torch.full(shape[:-1], -100)]
    if s.numel() == 0:
        targets.append(torch.zeros(shape, dtype=torch.float64))
    for target in targets:
        value, grad = value_and_grad(
            lambda z, y=target: distill_loss(z, t, y, label_smoothing=0.1, reduction=reduction), s
        )
        assert value.shape == (s.shape[:-1] if reduction == "none" else ())
        assert (value == 0).all()
        assert torch.equal(grad, torch.zeros_like(s))


def test_mean_counts_kept_positions_also_with_class_weights():
    s, t, y = batch()
    y[0] = -100
    settings = {"class_weight": WEIGHT, "label_smoothing": 0.1}
    torch.testing.assert_close(
        distill_loss(s, t, y, **settings) * 5, distill_loss(s, t, y, reduction="sum", **settings)
    )


@pytest.mark.parametrize("student_temperature", [None, 1.0])
def test_masked_classes_are_as_if_removed(student_temperature):
    s, t, _ = batch((6, 7))
    y = torch.tensor([0, 1, 2, 3, 0, 1])
    masked = torch.tensor([4, 6])
    s.data[:, masked], t[:, masked] = -INF, -INF
    kept = [0, 1, 2, 3, 5]
    loss = DistillLoss(3.0, student_temperature=student_temperature)
    assert_same(lambda z: loss(z, t, y), lambda z: loss(z[:, kept], t[:, kept], y), s)
    soft = F.one_hot(y, 7).double()
    assert_same(lambda z: loss(z, t, soft), lambda z: loss(z, t, y), s)


def test_a_class_of_weight_zero_may_be_masked_under_smoothing():
    s, t, _ = batch()
    y = torch.tensor([0, 1, 3, 4, 0, 1])
    s.data[:, 2], t[:, 2] = -INF, -INF
    value, grad = value_and_grad(lambda z: distill_loss(z, t, y, label_smoothing=0.1, class_weight=WEIGHT), s)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert distill_loss(s, t, y, label_smoothing=0.1) == INF  # as F.cross_entropy: smoothing wants that class


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_extreme_logits_stay_finite(dtype, temperature):
    ends = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4]], dtype=dtype)
    for target in (torch.tensor([1, 1, 2]), torch.tensor([0, 1, 0])):
        s = ends.clone().requires_grad_()
        value, grad = value_and_grad(
            lambda z, y=target: distill_loss(z, ends.flip(0), y, temperature, label_smoothing=0.1), s
        )
        assert value.isfinite()
        assert grad.isfinite().all()


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_nan_in_gives_nan_out(which):
    s, t, y = batch()
    (s.data if which == "student" else t)[2, 3] = math.nan
    per_position = distill_loss(s, t, y, reduction="none")
    assert per_position.isnan().tolist() == [False, False, True, False, False, False]
    assert distill_loss(s, t, y).isnan()


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.99, 0.999])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_half_precision_gradient_is_off_by_no_more_than_its_own_rounding(dtype, p, temperature):
    """On confident rows a softmax in bfloat16 loses the label's whole gradient: p - 1 cancels."""
    noise = draw(64, 10, scale=0.5)
    y = torch.arange(64) % 10
    confident = noise + F.one_hot(y, 10) * math.log(9 * p / (1 - p))
    s, t = confident.to(dtype), (confident + draw(64, 10, seed=3, scale=0.5)).to(dtype)

    def grad(s, t):
        leaf = s.clone().requires_grad_()
        return value_and_grad(lambda z: distill_loss(z, t, y, temperature, ce_weight=1.0, reduction="sum"), leaf)

    (value, half), (exact_value, exact) = grad(s, t), grad(s.double(), t.double())
    assert half.dtype == dtype
    # float32 rounds each row's log-sum-exp, about 9 here, to half an epsilon of it: up to 5e-7, on a loss of 1e-3.
    assert value.item() == pytest.approx(exact_value.item(), rel=1e-5, abs=64 * 5e-7)
    # Half an epsilon of the stored dtype, and float32's own error of a difference of numbers near 1.
    assert ((half.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() + 2e-6).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_result_is_wide_and_the_teachers_dtype_is_free(dtype, wide, reduction):
    s, t, y = batch()
    s = s.detach().to(dtype)
    for teacher in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        ours = distill_loss(s, t.to(teacher), y, reduction=reduction)
        assert ours.dtype == wide
        exact = distill_loss(s.double(), t.to(teacher).double(), y, reduction=reduction)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_autocast_changes_nothing():
    s, t, y = batch(dtype=torch.bfloat16)
    outside = value_and_grad(lambda z: distill_loss(z, t, y, 3.0, label_smoothing=0.1), s)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = value_and_grad(lambda z: distill_loss(z, t, y, 3.0, label_smoothing=0.1), s)
    assert inside[0].dtype == torch.float32
    assert torch.equal(inside[0], outside[0])
    assert torch.equal(inside[1], outside[1])


# ---- derivatives, transforms, copies

FULL = {"label_smoothing": 0.1, "smoothing": "others", "student_temperature": 2.0, "class_weight": WEIGHT}


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_first_and_second_derivatives_by_finite_differences(soft):
    s, t, y = batch()
    y[3] = -100
    target = draw(6, 5, seed=9).softmax(-1) if soft else y
    loss = DistillLoss(3.0, reduction="none", **FULL)
    assert torch.autograd.gradcheck(lambda z: loss(z, t, target), s)
    loss.backend = "reference"
    assert torch.autograd.gradcheck(lambda z: loss(z, t, target), s)
    assert torch.autograd.gradgradcheck(lambda z: loss(z, t, target), s)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_hessian_of_the_kd_term_is_the_softened_covariance(temperature):
    """T² KL has the Hessian diag(p) - p p^T with p the softened student: double backward against a closed form."""
    s, t, y = batch((5,))
    hessian = torch.autograd.functional.hessian(
        lambda z: distill_loss(z, t, y, temperature, kd_weight=1, ce_weight=0, backend="reference"), s.detach()
    )
    p = (s / temperature).softmax(-1).detach()
    torch.testing.assert_close(hessian, p.diag() - p.outer(p), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("scale", [3.0, 0.0])
def test_upstream_gradients_multiply(scale):
    s, t, y = batch()
    loss = DistillLoss(3.0, reduction="none", **FULL)
    upstream = scale * draw(6, seed=5)
    (actual,) = torch.autograd.grad(loss(s, t, y), s, upstream)
    expected = torch.stack([torch.autograd.grad(loss(s, t, y)[i], s)[0][i] * upstream[i] for i in range(6)])
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-15)
    graph = loss(s, t, y).sum()
    first, second = (torch.autograd.grad(graph, s, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


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
    loss.backend = "reference"
    _, tangent = torch.func.jvp(lambda z: loss(z, t, target), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(tangent, expected.sum(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    torch.compiler.reset()
    compiled = torch.compile(distill_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    module = torch.compile(DistillLoss(3.0, **FULL), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, temperature, eps in ((6, 3.0, 0.1), (4, 2.0, 0.0), (9, 5.0, 0.3)):
        s, t, y = batch((n, 5))
        y[1] = -100
        assert_same(
            lambda z, t=t, y=y, T=temperature, e=eps: compiled(z, t, y, T, label_smoothing=e, class_weight=WEIGHT),
            lambda z, t=t, y=y, T=temperature, e=eps: distill_loss(z, t, y, T, label_smoothing=e, class_weight=WEIGHT),
            s,
        )
        assert_same(lambda z, t=t, y=y: module(z, t, y), lambda z, t=t, y=y: DistillLoss(3.0, **FULL)(z, t, y), s)


def test_inputs_are_left_as_they_were():
    s, t, y = batch()
    y[1] = -100
    before = [x.detach().clone() for x in (s, t, y)]
    versions = [x._version for x in (s, t, y)]
    distill_loss(s, t, y, **FULL).backward()
    assert [x._version for x in (s, t, y)] == versions
    assert all(torch.equal(x, b) for x, b in zip((s, t, y), before, strict=True))


def test_layout_does_not_matter():
    s, t, y = batch((2, 3, 5))
    loss = DistillLoss(3.0, reduction="none", **FULL)
    expected = loss(s, t, y)
    strided = s.detach().movedim(-1, 0).contiguous().movedim(0, -1).requires_grad_()
    assert not strided.is_contiguous()
    torch.testing.assert_close(loss(strided, t[:, :, :], y.T.contiguous().T), expected, rtol=1e-14, atol=0)
    row = t[:1, :1].expand_as(t)  # stride 0: one teacher row for all positions
    torch.testing.assert_close(loss(s, row, y), loss(s, row.contiguous(), y), rtol=1e-14, atol=0)


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
