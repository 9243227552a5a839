"""Every bad input gets one line that names the argument, what it was, and what is allowed: the same on every backend.

The Triton kernels need no GPU to be refused: the checks come first. Its checks read no values, as that would make a GPU
wait: a label that is no class gives nan there, which interpreted_triton.py shows.
"""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from kd import DistillLoss, LinearDistillLoss, Teacher, distill_loss

S = torch.linspace(-2, 2, 12).reshape(4, 3)
T = S.flip(0)
Y = torch.tensor([0, 1, 2, 0])
P = torch.tensor([[0.5, 0.5, 0.0]] * 4)
NAN, INF = math.nan, math.inf
BACKENDS = ("auto", "reference", "cpu", "triton")
VALUES = ("target has label", "target has probability", "target has a row")  # checks that read them


def by_logits(student, teacher, target, **settings):
    return distill_loss(student, teacher, target, **settings)


def by_terms(student, teacher, target, **settings):
    return DistillLoss(**settings).terms(student, teacher, target)


def by_head(student, teacher, target, **settings):
    """The same logits as the features of a head that leaves them alone."""
    classes = student.shape[-1] if isinstance(student, torch.Tensor) and student.ndim else 3
    head = torch.eye(classes, dtype=getattr(student, "dtype", torch.float32))
    return LinearDistillLoss(**settings)(student, head, target, teacher_logits=teacher)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is published for Linux only")
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # it takes logits on a CPU then; no kernel is reached here
    return request.param


@pytest.fixture(params=[by_logits, by_terms, by_head])
def refused(request, backend):
    """Gives the one line by which the loss, in one of its forms, refuses something under every reduction."""

    def refused(error, message, *inputs, **settings):
        lines = set()
        for reduction in ("mean", "sum", "none"):
            with pytest.raises(error, match=message) as caught:
                request.param(*inputs, **{"backend": backend, "reduction": reduction, **settings})
            assert type(caught.value) is error
            lines.add(str(caught.value))
        (line,) = lines
        assert "\n" not in line
        return line

    refused.has_head, refused.reads_values = request.param is by_head, backend != "triton"
    return refused


NO_NUMBERS = ["0.5", True, 1j, torch.tensor(0.5), [1]]
OUTSIDE = [-1.0, -1e-300, NAN, INF, -INF, 1e300, 1e30, 2e6, 10**400]
# What each of them takes, in words, and numbers that only some of them refuse.
RANGES = {
    "temperature": ("a number from 0.001 to 1000", [0, 0.0, 1e-40, 1e-300, 0.0009999, 1000.001]),
    "student_temperature": ("None or a number from 0.001 to 1000", [0, 0.0, 1e-40, 1e-300, 0.0009999, 1000.001]),
    "kd_weight": ("a number from 0 to 1000000", [1000000.5]),
    "ce_weight": ("a number from 0 to 1000000", [1000000.5]),
    "label_smoothing": ("a number ≥ 0 and < 1", [1, 1.0, 1.5]),
    "teacher_smoothing": ("a number ≥ 0 and < 1", [1, 1.0, 1.5]),
}


@pytest.mark.parametrize("target", [Y, P], ids=["labels", "probabilities"])
@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range_or_no_numbers(name, target, refused):
    allowed, more = RANGES[name]
    for value in (*NO_NUMBERS, *OUTSIDE, *more):
        error = TypeError if any(value is other for other in NO_NUMBERS) else ValueError
        line = refused(error, f"^{name}=", S, T, target, **{name: value})
        got = f", got {type(value).__name__}" if error is TypeError else ""
        assert line == f"{name}={value!r}: must be {allowed}{got}"
        with pytest.raises(error) as caught:
            DistillLoss(**{name: value})
        assert str(caught.value) == line


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"temperature": None}, TypeError, r"temperature=None: .* got NoneType"),
        ({"label_smoothing": None}, TypeError, r"label_smoothing=None: "),
        ({"kd_weight": None}, TypeError, r"kd_weight=None: "),
        ({"smoothing": "Uniform"}, ValueError, r"smoothing='Uniform': must be one of uniform, others"),
        ({"smoothing": 1}, TypeError, r"smoothing=1: must be one of uniform, others, got int"),
        ({"reduction": "batchmean"}, ValueError, r"reduction='batchmean': must be one of mean, sum, none"),
        ({"reduction": None}, TypeError, r"reduction=None: must be one of mean, sum, none"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda': must be one of auto, reference"),
        ({"ignore_index": 1.0}, TypeError, r"ignore_index=1.0: must be an int, got float"),
        ({"ignore_index": 2**63}, ValueError, r"ignore_index=9223372036854775808: must fit into int64"),
        ({"ignore_index": -(2**63) - 1}, ValueError, r"ignore_index=-9223372036854775809: must fit into int64"),
        ({"ignore_index": True}, TypeError, r"ignore_index=True: must be an int, got bool"),
        ({"class_weight": [1.0, 1.0, 1.0]}, TypeError, r"class_weight is list: must be None or a floating tensor"),
        ({"class_weight": torch.ones(3, dtype=torch.int64)}, TypeError, r"class_weight is torch.int64 of shape \(3,\)"),
        ({"class_weight": torch.ones(1, 3)}, TypeError, r"class_weight is .* shape \(1, 3\): .* shape \(K,\)"),
        (
            {"class_weight": torch.tensor([1.0, -2.0, 1.0])},
            ValueError,
            r"class_weight has -2: must be from 0 to 1000000",
        ),
        (
            {"class_weight": torch.tensor([1.0, NAN, 1.0])},
            ValueError,
            r"class_weight has nan: must be from 0 to 1000000",
        ),
        (
            {"class_weight": torch.tensor([1.0, INF, 1.0])},
            ValueError,
            r"class_weight has inf: must be from 0 to 1000000",
        ),
        ({"class_weight": torch.tensor([1.0, 1e38, 1.0])}, ValueError, r"class_weight has 1e\+38: must be from 0 to"),
        ({"class_weight": torch.ones(3).double() * 1e300}, ValueError, r"class_weight has 1e\+300: must be from 0 to"),
    ],
)
def test_settings(settings, error, message, refused):
    with pytest.raises(error, match=message):
        DistillLoss(**settings)
    for target in (Y, P):
        refused(error, message, S, T, target, **settings)


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("kd_weight", NAN), ("label_smoothing", 1.0)])
def test_a_setting_that_a_schedule_made_wrong_is_met_at_the_next_call(name, value):
    loss = DistillLoss()
    setattr(loss, name, value)
    with pytest.raises(ValueError, match=rf"^{name}={value!r}: must be "):
        loss(S, T, Y)


META = {"device": "meta"}


@pytest.mark.parametrize(
    ("student", "teacher", "target", "settings", "error", "message"),
    [
        # labels
        (S, T, Y - 1, {}, ValueError, r"target has label -1: must be 0\.\.2 or ignore_index=-100"),
        (S, T, Y + 1, {}, ValueError, r"target has label 3: must be 0\.\.2 or ignore_index=-100"),
        (S, T, Y - 100, {"ignore_index": -99}, ValueError, r"target has label -100: .* ignore_index=-99"),
        (
            S,
            T,
            Y.float(),
            {},
            ValueError,
            r"target of torch.float32 with shape \(4,\): .*\(\.\.\., 3\).*target.long\(\)",
        ),
        (S, T, Y.bool(), {}, TypeError, r"target.dtype=torch.bool: must be int64"),
        (S, T, Y.int(), {}, TypeError, r"target.dtype=torch.int32: must be int64 .*target.long\(\)"),
        (S, T, Y.short(), {}, TypeError, r"target.dtype=torch.int16: must be int64"),
        (S, T, Y.to(torch.int8), {}, TypeError, r"target.dtype=torch.int8: must be int64"),
        (S, T, Y.to(torch.uint8), {}, TypeError, r"target.dtype=torch.uint8: must be int64"),
        (S, T, Y.to(torch.complex64), {}, TypeError, r"target.dtype=torch.complex64: must be int64"),
        (S, T, Y[:3], {}, ValueError, r"target has shape \(3,\): must be \(4,\) for student_logits \(4, 3\)"),
        (S, T, Y[:1], {}, ValueError, r"target has shape \(1,\): must be \(4,\)"),
        (S, T, Y[:, None], {}, ValueError, r"target has shape \(4, 1\): must be \(4,\)"),
        (S, T, Y[0], {}, ValueError, r"target has shape \(\): must be \(4,\)"),
        (S, T, F.one_hot(Y, 3), {}, ValueError, r"target has shape \(4, 3\): must be \(4,\)"),
        (S, T, Y.to("meta"), {}, ValueError, r"target is on meta: must be on cpu"),
        (S, T, Y.numpy(), {}, TypeError, r"target=array.*: must be a tensor, got ndarray"),
        (S, T, Y.tolist(), {}, TypeError, r"target=\[0, 1, 2, 0\]: must be a tensor, got list"),
        (S, T, None, {}, TypeError, r"target=None: must be a tensor, got NoneType"),
        # probabilities as target
        (S, T, P - 0.1, {}, ValueError, r"target has probability -0.1: must be ≥ 0"),
        (S, T, P * NAN, {}, ValueError, r"target has probability nan: must be ≥ 0"),
        (S, T, P * 2, {}, ValueError, r"target has a row that sums to 2: probabilities must sum to 1"),
        (S, T, P * 0, {}, ValueError, r"target has a row that sums to 0: "),
        (S, T, P * INF, {}, ValueError, r"target has probability nan"),
        (S, T, (P * 0.9).bfloat16(), {}, ValueError, r"target has a row that sums to 0\.[89]"),
        (S, T, P * 0.999, {}, ValueError, r"target has a row that sums to 0.999"),
        (S, T, P[:, :2], {}, ValueError, r"shape \(4, 2\): floating targets are probabilities of shape \(\.\.\., 3\)"),
        (S, T, P[:1], {}, ValueError, r"target has shape \(1, 3\): must be \(4, 3\)"),
        (S, T, P, {"ignore_index": 1}, ValueError, r"ignore_index=1: must be < 0 \(off\) with probabilities"),
        (S, T, P.clone().requires_grad_(), {}, ValueError, r"target.requires_grad=True: .*target.detach\(\)"),
        # class weights
        (S, T, Y, {"class_weight": torch.ones(2)}, ValueError, r"class_weight has shape \(2,\): must be \(3,\)"),
        (S, T, Y, {"class_weight": torch.ones(1)}, ValueError, r"class_weight has shape \(1,\): must be \(3,\)"),
        (S, T, Y, {"class_weight": torch.ones(3, **META)}, ValueError, r"class_weight is on meta: must be on cpu"),
        (
            S,
            T,
            Y,
            {"class_weight": torch.ones(3, requires_grad=True)},
            ValueError,
            r"class_weight.requires_grad=True: must be False",
        ),
        # teacher
        (S, None, Y, {}, ValueError, r"teacher_logits=None: must be given with kd_weight=0.9"),
        (S, T.tolist(), Y, {}, TypeError, "teacher_logits: must be a tensor of logits, got list"),
        (S, T.long(), Y, {}, TypeError, r"teacher_logits.dtype=torch.int64: must be a real floating dtype"),
        (S, T.to_sparse(), Y, {}, TypeError, r"teacher_logits.layout=torch.sparse_coo: must be dense"),
        (S, T, P.to_sparse(), {}, TypeError, r"target.layout=torch.sparse_coo: must be dense"),
        (S, T[:, :1], Y, {}, ValueError, r"teacher_logits has shape \(4, 1\): must be \(4, 3\)"),
        (S, T[:1], Y, {}, ValueError, r"teacher_logits has shape \(1, 3\): must be \(4, 3\)"),
        (S[:, :1], T[:1], Y * 0, {}, ValueError, r"teacher_logits has shape \(1, 3\): must be \(4, 1\)"),
        (S, T[:, :2], Y, {}, ValueError, r"teacher_logits has shape \(4, 2\): must be \(4, 3\)"),
        (S, T[None], Y, {}, ValueError, r"teacher_logits has shape \(1, 4, 3\): must be \(4, 3\)"),
        (S, T.to("meta"), Y, {}, ValueError, r"teacher_logits is on meta: must be on cpu"),
        (
            S,
            T.clone().requires_grad_(),
            Y,
            {},
            ValueError,
            r"teacher_logits.requires_grad=True: .*torch.no_grad\(\) or teacher_logits.detach\(\)",
        ),
        # student
        (S.long(), T, Y, {}, TypeError, r"student_logits.dtype=torch.int64: must be a real floating dtype"),
        (S.to(torch.complex64), T, Y, {}, TypeError, r"student_logits.dtype=torch.complex64"),
        (S.tolist(), T, Y, {}, TypeError, "student_logits: must be a tensor of logits, got list"),
        (S[:, :0], T[:, :0], Y, {}, ValueError, r"student_logits has shape \(4, 0\): .* K ≥ 1"),
        (S[0, 0], T[0, 0], Y[0], {}, ValueError, r"student_logits has shape \(\): "),
    ],
)
def test_tensors(student, teacher, target, settings, error, message, refused):
    if message.startswith(VALUES) and not refused.reads_values:
        pytest.skip("a check that reads values, which a GPU would have to be waited for")
    if refused.has_head and message.startswith("student_logits"):
        message = "^(features|weight)"  # what the caller gave
    refused(error, message, student, teacher, target, **settings)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
@pytest.mark.parametrize("by", [by_logits, by_head])
@pytest.mark.parametrize(
    ("inputs", "settings"),
    [
        ((S[:0], T[:0], Y[:0]), {}),
        ((S[:0], T[:0], P[:0]), {}),
        ((S, T, torch.full_like(Y, -100)), {}),
        ((S, T, torch.full_like(Y, -100)), {"label_smoothing": 0.1, "teacher_smoothing": 0.1}),
        ((S * NAN, T, torch.full_like(Y, -100)), {}),  # whatever is at an ignored position
        ((S, T, Y), {"kd_weight": 0.0, "ce_weight": 0.0}),
        ((S, None, P), {"kd_weight": 0.0, "ce_weight": 0.0}),
        ((S, T, Y), {"kd_weight": 0.0, "ce_weight": 1.0, "class_weight": torch.zeros(3)}),
    ],
    ids=["empty", "empty soft", "ignored", "ignored smoothed", "ignored nan", "no weights", "no teacher", "no classes"],
)
def test_nothing_to_learn_from_is_0_with_a_gradient_of_0(inputs, settings, by, backend):
    for reduction in ("mean", "sum", "none"):
        student = inputs[0].clone().requires_grad_()
        value = by(student, *inputs[1:], **settings, reduction=reduction, backend=backend)
        assert torch.equal(value, torch.zeros(len(student)) if reduction == "none" else torch.tensor(0.0))
        value.sum().backward()
        assert torch.equal(student.grad, torch.zeros_like(student))


def test_without_a_teacher_its_logits_are_not_looked_at():
    expected = distill_loss(S, None, Y, kd_weight=0, ce_weight=1)
    for anything in (T[:1], T.to("meta"), T.clone().requires_grad_(), T.softmax(-1), "no tensor"):
        assert torch.equal(distill_loss(S, anything, Y, kd_weight=0, ce_weight=1), expected)
    torch.testing.assert_close(expected, F.cross_entropy(S, Y))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounded_probabilities_are_probabilities(dtype):
    """Mixup in half precision: the rows sum to 1 only as far as the dtype allows."""
    logits = torch.randn(100, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = (logits.softmax(-1).to(dtype) * 0.3 + F.one_hot(torch.arange(100), 1000).to(dtype) * 0.7).to(dtype)
    ours = distill_loss(logits, None, target, kd_weight=0, ce_weight=1)
    torch.testing.assert_close(ours, F.cross_entropy(logits, target.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_teacher_of_probabilities_warns_once_a_call(dtype):
    probabilities = T.double().softmax(-1).to(dtype)
    for _ in range(2):
        with pytest.warns(
            UserWarning, match=r"teacher_logits look like probabilities: .*probabilities\.log\(\)"
        ) as seen:
            distill_loss(S, probabilities, Y)
        assert len(seen) == 1
    with pytest.warns(UserWarning, match=r"teacher_logits look like probabilities"):
        distill_loss(S.reshape(2, 2, 3), probabilities.reshape(2, 2, 3), Y.reshape(2, 2))


def test_a_teacher_in_8_bits_is_widened():
    teacher = T.to(torch.float8_e4m3fn)
    assert torch.equal(distill_loss(S, teacher, Y), distill_loss(S, teacher.float(), Y))


def test_logits_do_not_warn():
    one_row = T.clone()
    one_row[0] = T[0].softmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for teacher in (T, T.log_softmax(-1), torch.zeros_like(T), one_row, T * NAN):
            distill_loss(S, teacher, Y)
        distill_loss(S[:, :1], torch.ones(4, 1), Y * 0)  # one class: 1.0 is as good a logit as any
        distill_loss(S[:0], T[:0], Y[:0])


def test_checks_of_values_are_left_out_where_values_cannot_be_read():
    compiled = torch.compile(distill_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(S, T.softmax(-1), Y), distill_loss(S, T.softmax(-1).log().exp() + 7, Y))
    assert torch.func.vmap(distill_loss)(S, T.softmax(-1), Y).shape == (4,)
    assert distill_loss(S.to("meta"), T.to("meta"), Y.to("meta")).is_meta
    with pytest.raises(ValueError, match=r"teacher_logits has shape"):
        torch.func.vmap(distill_loss)(S, T[:, :2], Y)  # shapes are still checked


def test_no_gradient_reaches_the_teacher_under_torch_func():
    with pytest.raises(ValueError, match=r"teacher_logits.requires_grad=True"):
        torch.func.grad(distill_loss, argnums=(0, 1))(S, T, Y)


def test_an_output_given_as_logits_is_told_about_its_logits():
    teacher = Teacher(torch.nn.Linear(5, 3))
    with pytest.raises(TypeError, match=r"teacher_logits: must be a tensor of logits, got Output; pass its \.logits"):
        distill_loss(torch.zeros(2, 3), teacher(torch.zeros(2, 5)), torch.tensor([0, 1]))
