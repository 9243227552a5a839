"""LinearDistillLoss against F.linear followed by DistillLoss, chunk by chunk, and what it must not do: hold N x K."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd import distill_loss
from kd.losses import linear
from kd.losses.kernels import chunked
from kd.losses.linear import LinearDistillLoss

N, D, DT, K = 7, 3, 4, 5
CLASS_WEIGHT = torch.tensor([0.3, 2.0, 0.0, 1.0, 5.0], dtype=torch.float64)
ROW = K * 8 * 3  # bytes that a row of float64 takes of the budget: logits, the teacher's, gradient
REFERENCE_ROW = K * 8 * (2 + linear.REFERENCE_COPIES / linear.PARTS)  # and with backend="reference"


def draw(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


class Case:
    """A student's head with its features, a teacher's, and labels of which one is ignored."""

    def __init__(self, lead=(N,), dtype=torch.float64, bias=True, soft=False, d=D, k=K):
        self.x = draw(*lead, d, seed=1, dtype=dtype).requires_grad_()
        self.w = draw(k, d, seed=2, scale=2.0, dtype=dtype).requires_grad_()
        self.b = draw(k, seed=3, dtype=dtype).requires_grad_() if bias else None
        self.tx, self.tw, self.tb = draw(*lead, DT, seed=4), draw(k, DT, seed=5), draw(k, seed=6)
        self.y = torch.randint(k, lead, generator=torch.Generator().manual_seed(7))
        if soft:
            self.y = draw(*lead, k, seed=8).softmax(-1)
        elif self.y.numel() > 2:
            self.y.view(-1)[2] = -100

    @property
    def leaves(self):
        return [tensor for tensor in (self.x, self.w, self.b) if tensor is not None]

    def teacher(self, kind="head"):
        if kind == "logits":
            return {"teacher_logits": F.linear(self.tx, self.tw, self.tb)}
        return {"teacher_features": self.tx, "teacher_weight": self.tw, "teacher_bias": self.tb}

    def ours(self, loss, kind="head"):
        return loss(self.x, self.w, self.y, bias=self.b, **self.teacher(kind))

    def unfused(self, **settings):
        settings.pop("memory_budget", None)
        return distill_loss(F.linear(self.x, self.w, self.b), F.linear(self.tx, self.tw, self.tb), self.y, **settings)

    def gradients(self, value, upstream=None):
        return torch.autograd.grad(value, self.leaves, torch.ones_like(value) if upstream is None else upstream)


def assert_close(ours, theirs, tolerance=1e-12):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def chunks(monkeypatch):
    """The number of rows of logits each time that some are made."""
    sizes, logits = [], chunked._Head.logits

    def counted(head, part):
        made = logits(head, part)
        sizes.append(len(made))
        return made

    monkeypatch.setattr(chunked._Head, "logits", counted)
    return sizes


# ---- values and gradients


SETTINGS = {
    "default": {},
    "smoothed": {"temperature": 2.0, "label_smoothing": 0.1, "class_weight": CLASS_WEIGHT},
    "others": {"label_smoothing": 0.4, "smoothing": "others", "student_temperature": 1.0, "kd_weight": 2.0},
    "kd only": {"ce_weight": 0.0},
    "ce only": {"kd_weight": 0.0, "ce_weight": 0.7},
    "nothing": {"kd_weight": 0.0, "ce_weight": 0.0},
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_equals_linear_then_distill_loss(settings, soft, reduction, backend):
    settings = {**settings, "reduction": reduction, "backend": backend}
    row = REFERENCE_ROW if backend == "reference" else ROW
    for bias, kind, rows in ((True, "head", 1), (False, "logits", 3), (True, "logits", N), (False, "head", 3)):
        case = Case(bias=bias, soft=soft)
        ours = case.ours(LinearDistillLoss(**settings, memory_budget=int(rows * row)), kind)
        theirs = case.unfused(**settings)
        upstream = draw(*ours.shape, seed=9)
        assert_close([ours, *case.gradients(ours, upstream)], [theirs, *case.gradients(theirs, upstream)])


@pytest.mark.parametrize(
    ("rows", "sizes"), [(0.01, [1] * 7), (1, [1] * 7), (2, [2, 2, 2, 1]), (3, [3, 3, 1]), (6.9, [4, 3]), (7, [7])]
)
def test_chunks_fit_the_budget_and_are_of_equal_size(rows, sizes, chunks):
    case = Case()
    loss = LinearDistillLoss(backend="reference", memory_budget=int(rows * REFERENCE_ROW))
    expected = case.unfused()
    assert_close(case.gradients(case.ours(loss)), case.gradients(expected))
    # Of student and teacher in turn, and once: mean and sum compute the gradient with the loss.
    assert chunks[::2] == chunks[1::2] == sizes


@pytest.mark.parametrize("lead", [(), (1,), (2, 1, 3)])
@pytest.mark.parametrize(("soft", "reduction"), [(False, "none"), (True, "mean")])
def test_leading_dimensions(lead, soft, reduction):
    case = Case(lead, soft=soft)
    ours = case.ours(LinearDistillLoss(reduction=reduction, memory_budget=2 * ROW, label_smoothing=0.1))
    theirs = case.unfused(reduction=reduction, label_smoothing=0.1)
    assert ours.shape == theirs.shape
    assert_close([ours, *case.gradients(ours)], [theirs, *case.gradients(theirs)])


def test_terms_are_the_unweighted_parts():
    for reduction in ("mean", "sum", "none"):
        case, settings = Case(), {"label_smoothing": 0.1, "reduction": reduction}
        loss = LinearDistillLoss(kd_weight=0.7, ce_weight=0.2, memory_budget=2 * ROW, **settings)
        terms = loss.terms(case.x, case.w, case.y, bias=case.b, **case.teacher())
        torch.testing.assert_close(terms.loss, 0.2 * terms.ce + 0.7 * terms.kd, rtol=1e-14, atol=0)
        torch.testing.assert_close(terms.ce, case.unfused(kd_weight=0, ce_weight=1, **settings).detach())
        torch.testing.assert_close(terms.kd, case.unfused(kd_weight=1, ce_weight=0, **settings).detach())
        assert not terms.ce.requires_grad
        assert not terms.kd.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("which", [needs for needs in itertools.product([False, True], repeat=3) if any(needs)])
def test_only_gradients_that_are_needed(which, reduction):
    case = Case()
    for tensor, needed in zip((case.x, case.w, case.b), which, strict=True):
        tensor.requires_grad_(needed)
    leaves = [tensor for tensor, needed in zip(case.leaves, which, strict=True) if needed]
    values = case.ours(LinearDistillLoss(reduction=reduction, memory_budget=2 * ROW)), case.unfused(reduction=reduction)
    assert_close(*(torch.autograd.grad(value.sum(), leaves) for value in values))


# ---- upstream gradients, graphs, derivatives


@pytest.mark.parametrize("scale", [3.0, 0.0, -(2.0**16)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_upstream_gradients_multiply(scale, reduction):
    case = Case()
    ours = case.ours(LinearDistillLoss(reduction=reduction, memory_budget=2 * ROW))
    theirs = case.unfused(reduction=reduction)
    for function in (lambda v: (scale * v).sum(), lambda v: scale * v.square().sum()):
        ours_, theirs_ = (torch.autograd.grad(function(v), case.leaves, retain_graph=True) for v in (ours, theirs))
        assert_close([g / max(1, abs(scale)) for g in ours_], [g / max(1, abs(scale)) for g in theirs_])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_retained_graph_gives_equal_gradients_again(reduction):
    case = Case()
    value = case.ours(LinearDistillLoss(reduction=reduction, memory_budget=2 * ROW)).sum()
    first = torch.autograd.grad(value, case.leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()  # it is the caller's, who may do this
    for _ in range(2):
        again = torch.autograd.grad(value, case.leaves, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    for a, b in zip(torch.autograd.grad(2 * value, case.leaves), kept, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_an_error_and_no_silent_zero(reduction):
    case = Case()
    value = case.ours(LinearDistillLoss(reduction=reduction)).sum()
    gradients = torch.autograd.grad(value, case.leaves, create_graph=True)
    assert all(gradient.requires_grad for gradient in gradients)
    with pytest.raises(RuntimeError, match=r"has no second derivative: use DistillLoss\(backend='ref"):
        sum(gradient.sum() for gradient in gradients).backward()


def test_torch_func_grad():
    case, loss = Case(), LinearDistillLoss(memory_budget=3 * ROW)
    expected = case.gradients(case.unfused())
    given = [tensor.detach() for tensor in case.leaves]
    ours = torch.func.grad(lambda x, w, b: loss(x, w, case.y, bias=b, **case.teacher()), argnums=(0, 1, 2))(*given)
    assert_close(ours, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
def test_under_torch_compile():
    torch.compiler.reset()
    case, loss = Case(), LinearDistillLoss(memory_budget=3 * ROW)

    @torch.compile(backend="aot_eager")
    def step(x, w, b):
        return 2 * loss(x.tanh(), w, case.y, bias=b, **case.teacher())

    logits = F.linear(case.x.tanh(), case.w, case.b)
    theirs = 2 * distill_loss(logits, case.teacher("logits")["teacher_logits"], case.y)
    assert_close(case.gradients(step(case.x, case.w, case.b)), case.gradients(theirs))


@pytest.mark.parametrize("kind", ["head", "logits"])
def test_inputs_are_left_as_they_were(kind):
    case = Case()
    teacher = case.teacher(kind)
    inputs = [*case.leaves, case.y, *teacher.values()]
    before, versions = [tensor.detach().clone() for tensor in inputs], [tensor._version for tensor in inputs]
    LinearDistillLoss(memory_budget=2 * ROW)(case.x, case.w, case.y, bias=case.b, **teacher).backward()
    assert [tensor._version for tensor in inputs] == versions
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


# ---- nothing to learn from


@pytest.mark.parametrize("lead", [(0,), (2, 0), (3,)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_learn_from_is_zero_with_a_graph(lead, reduction):
    case = Case(lead)
    case.y = torch.full(lead, -100)
    value = case.ours(LinearDistillLoss(reduction=reduction, label_smoothing=0.1))
    assert value.shape == (lead if reduction == "none" else ())
    assert (value == 0).all()
    for gradient, tensor in zip(case.gradients(value), case.leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


# ---- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_half_precision_is_no_worse_than_the_unfused_loss(dtype, reduction):
    """Sums over chunks are in float32 and rounded once; F.linear's backward rounds once too."""
    case = Case((64,), dtype=dtype, d=16, k=40)
    exact = Case((64,), d=16, k=40)
    for half, double in zip(case.leaves, exact.leaves, strict=True):
        double.data.copy_(half.detach().double())
    settings = {"reduction": reduction, "label_smoothing": 0.1}
    loss = LinearDistillLoss(memory_budget=20_000, **settings)  # two chunks, and two blocks of classes
    upstream = draw(*(() if reduction != "none" else (64,)), seed=5)
    reference_value = exact.unfused(**settings)
    expected = exact.gradients(reference_value, upstream)
    ours, theirs = case.ours(loss), case.unfused(**settings)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    upstream = upstream.float()
    for a, b, e in zip(case.gradients(ours, upstream), case.gradients(theirs, upstream), expected, strict=True):
        assert a.dtype == dtype
        own, peer = ((g.double() - e).norm() / e.norm() for g in (a, b))
        assert own <= 1.1 * peer + 1e-4


@pytest.mark.parametrize("heaviest", [1, 900])
def test_float16_neither_underflows_nor_overflows_under_a_loss_scale(heaviest):
    """A mean over 2048 rows of small probabilities is below float16 until the loss is scaled."""
    x, w = draw(2048, 8, seed=1, dtype=torch.float16), draw(4000, 8, seed=2, scale=0.1, dtype=torch.float16)
    y = torch.randint(4000, (2048,), generator=torch.Generator().manual_seed(0))
    scale = 2.0**14 / heaviest
    class_weight = torch.linspace(1, heaviest, 4000)
    loss = LinearDistillLoss(kd_weight=0, ce_weight=1, class_weight=class_weight)

    def gradients(dtype):
        leaves = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
        return [g.double() for g in torch.autograd.grad(scale * loss(*leaves, y), leaves)]

    for ours, expected in zip(gradients(torch.float16), gradients(torch.float64), strict=True):
        assert ours.isfinite().all()
        assert (ours - expected).norm() <= 2e-3 * expected.norm()


def test_many_chunks_sum_in_float32():
    """4,096 equal contributions of 1 + 2^-7 to one weight: a sum in bfloat16 stops growing at 256."""
    n = 4096
    x, w = torch.ones(n, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16).requires_grad_()
    loss = LinearDistillLoss(kd_weight=0, ce_weight=1, reduction="sum", memory_budget=1)
    loss(x, w, torch.zeros(n, dtype=torch.int64)).backward()
    assert w.grad.flatten().tolist() == [-n / 2, n / 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_is_that_of_linear(dtype):
    """Under autocast the logits are bfloat16 and gradients float32; float64 stays what it is."""
    case = Case((64,), dtype=dtype, d=16, k=40)
    case.tx, case.tw, case.tb = (tensor.to(dtype) for tensor in (case.tx, case.tw, case.tb))
    loss = LinearDistillLoss(memory_budget=100_000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = case.ours(loss), case.unfused()
        inside = case.gradients(case.ours(loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    expected = case.gradients(theirs)
    tolerance = 1e-2 if dtype == torch.float32 else 1e-12
    for a, b, c in zip(case.gradients(ours), inside, expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b)
        assert (a - c).norm() <= tolerance * c.norm()
    if dtype == torch.float32:
        assert not torch.equal(ours, case.ours(loss))


# ---- memory


class Largest(TorchDispatchMode):
    """The most bytes of any tensor that an operation makes; views of what was there before do not count."""

    def __init__(self, *given):
        super().__init__()
        self.bytes, self.given = 0, {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("kind", "dtype", "reduction", "backend"),
    [
        ("head", torch.float32, "mean", "reference"),
        ("head", torch.bfloat16, "none", "auto"),
        ("logits", torch.bfloat16, "mean", "reference"),
        ("logits", torch.float32, "none", "auto"),
    ],
)
def test_no_more_logits_than_the_budget_are_held(kind, dtype, reduction, backend):
    n, d, k, budget = 300, 4, 64, 3000
    case = Case((n,), dtype=dtype, d=d, k=k)
    teacher = case.teacher(kind)
    loss = LinearDistillLoss(reduction=reduction, backend=backend, memory_budget=budget)
    with Largest(*teacher.values()) as seen:
        loss(case.x, case.w, case.y, bias=case.b, **teacher).sum().backward()
    assert case.w.grad is not None
    assert seen.bytes <= max(budget, n * d * 4) < n * k * dtype.itemsize / 6
    with Largest() as seen:
        case.unfused(reduction=reduction).sum().backward()
    assert seen.bytes >= n * k * dtype.itemsize


# ---- bad input


X, W, Y, TL = draw(4, 3, seed=1), draw(5, 3, seed=2), torch.tensor([0, 1, 2, 4]), draw(4, 5, seed=3)
TX, TW, B = draw(4, 2, seed=4), draw(5, 2, seed=5), draw(5, seed=6)
HEAD = {"teacher_features": TX, "teacher_weight": TW}
NONE = {"teacher_logits": None}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": X.long()}, TypeError, "^features: must be a floating tensor, got torch.int64"),
        ({"weight": W.T}, ValueError, r"^weight has shape \(3, 5\): must be \(K, D\) for .* features \(4, 3\)"),
        ({"weight": W.float()}, TypeError, r"^weight.dtype=torch.float32: must be torch.float64"),
        ({"weight": W.to("meta")}, ValueError, r"^weight is on meta: must be on cpu, the device of features"),
        ({"bias": B[:3]}, ValueError, r"^bias has shape \(3,\): must be \(5,\)"),
        (HEAD, ValueError, r"^teacher: must be teacher_logits alone, or teacher_features with teacher_weight"),
        (
            {**NONE, **HEAD, "teacher_features": TX[:3]},
            ValueError,
            r"^teacher_logits has shape \(3, 5\): must be \(4, 5\)",
        ),
        ({**NONE, **HEAD, "teacher_weight": TW.clone().requires_grad_()}, ValueError, r"^teacher_weight.requires_grad"),
        ({**NONE, **{k: v.to("meta") for k, v in HEAD.items()}}, ValueError, "^teacher_logits is on meta: must be"),
    ],
)
def test_bad_tensors(changed, error, message):
    given = {"features": X, "weight": W, "target": Y, "teacher_logits": TL, **changed}
    with pytest.raises(error, match=message) as caught:
        LinearDistillLoss()(**given)
    assert "\n" not in str(caught.value)
