"""Wrong settings and tensors get one line that names the argument, the value and what is allowed, on every backend.

The Triton kernels need no GPU for that: the checks come first.
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
META = {"device": "meta"}
VALUES = ("target has label", "target has a row")  # checks that read them


@pytest.fixture(params=["auto", "reference", "cpu", "triton"])
def backend(request, monkeypatch):
    if request.param == "triton":
        pytest.importorskip("triton", reason="triton is published for Linux only")
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # then it takes logits on a CPU; no kernel is reached here
    return request.param


# ---- settings

NOT_NUMBERS = ["0.5", True, 1j, torch.tensor(0.5), [1]]
OUTSIDE = [-1.0, -1e-300, NAN, INF, -INF, 1e300, 2e6, 10**400]
NOT_TEMPERATURES = [0, 0.0, 1e-40, 0.0009999, 1000.001]
RANGES = {
    "temperature": ("a number from 0.001 to 1000", [None, *NOT_TEMPERATURES]),
    "student_temperature": ("None or a number from 0.001 to 1000", NOT_TEMPERATURES),
    "kd_weight": ("a number from 0 to 1000000", [None, 1000000.5]),
    "ce_weight": ("a number from 0 to 1000000", [None, 1000000.5]),
    "label_smoothing": ("a number ≥ 0 and < 1", [None, 1, 1.5]),
    "teacher_smoothing": ("a number ≥ 0 and < 1", [None, 1, 1.5]),
    "memory_budget": ("None or a whole number of bytes ≥ 1", [0, 1.5]),
}


@pytest.mark.parametrize("name", RANGES)
def test_numbers_out_of_range_are_refused_in_the_constructor_and_where_a_schedule_assigns_them(name):
    allowed, more = RANGES[name]
    for value in (*NOT_NUMBERS, *(() if name == "memory_budget" else OUTSIDE), *more):
        line = f"{name}={value!r}: must be {allowed}"
        loss = LinearDistillLoss()
        before = getattr(loss, name)
        with pytest.raises(ValueError) as constructed:
            LinearDistillLoss(**{name: value})
        with pytest.raises(ValueError) as assigned:
            setattr(loss, name, value)
        assert str(constructed.value) == str(assigned.value) == line
        assert getattr(loss, name) == before


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"smoothing": "Uniform"}, ValueError, r"smoothing='Uniform': must be one of uniform, others"),
        ({"reduction": "batchmean"}, ValueError, r"reduction='batchmean': must be one of mean, sum, none"),
        ({"backend": "cuda"}, ValueError, r"backend='cuda': must be one of auto, reference, cpu, triton"),
        ({"ignore_index": 1.0}, ValueError, r"ignore_index=1.0: must be an int"),
        ({"ignore_index": 2**63}, ValueError, r"ignore_index=9223372036854775808: must be an int that fits into int64"),
        ({"class_weight": [1.0, 1.0, 1.0]}, TypeError, "class_weight: must be a floating tensor, got list"),
        ({"class_weight": torch.tensor([1.0, -2.0])}, ValueError, r"class_weight has -2: must be from 0 to 1000000"),
    ],
)
def test_wrong_settings(settings, error, message):
    for make in (DistillLoss, LinearDistillLoss, lambda **settings: distill_loss(S, T, Y, **settings)):
        with pytest.raises(error, match=message):
            make(**settings)


# ---- tensors


@pytest.mark.parametrize(
    ("student", "teacher", "target", "settings", "error", "message"),
    [
        # labels
        (S, T, Y + 1, {}, ValueError, r"target has label 3: must be 0\.\.2 or ignore_index=-100"),
        (S, T, Y - 100, {"ignore_index": -99}, ValueError, r"target has label -100: .* ignore_index=-99"),
        (S, T, Y.float(), {}, ValueError, r"target of torch.float32 with shape \(4,\): .*target.long\(\)"),
        (S, T, Y.int(), {}, TypeError, r"target: must be int64 .*target.long\(\).* got torch.int32"),
        (S, T, F.one_hot(Y, 3), {}, ValueError, r"target has shape \(4, 3\): must be \(4,\)"),
        (S, T, Y.to("meta"), {}, ValueError, r"target is on meta: must be on cpu"),
        (S, T, Y.tolist(), {}, TypeError, "target: must be int64 labels .* got list"),
        # probabilities as target
        (S, T, P - 0.1, {}, ValueError, "target has a row that sums to 0.7, with -0.1"),
        (S, T, P[:, :2], {}, ValueError, r"shape \(4, 2\): must be probabilities of shape \(\.\.\., 3\)"),
        (S, T, P[:1], {}, ValueError, r"target has shape \(1, 3\): must be \(4, 3\)"),
        (S, T, P, {"ignore_index": 1}, ValueError, r"ignore_index=1: must be < 0 \(off\) with probabilities"),
        (S, T, P.clone().requires_grad_(), {}, ValueError, r"target.requires_grad=True: .*target.detach\(\)"),
        # class weights
        (S, T, Y, {"class_weight": torch.ones(2)}, ValueError, r"class_weight has shape \(2,\): must be \(3,\)"),
        # teacher
        (S, None, Y, {}, ValueError, r"teacher_logits=None: must be given with kd_weight=0.9"),
        (S, T.tolist(), Y, {}, TypeError, "teacher_logits: must be a floating tensor, got list"),
        (S, T[:1], Y, {}, ValueError, r"teacher_logits has shape \(1, 3\): must be \(4, 3\)"),
        (S, T.to("meta"), Y, {}, ValueError, r"teacher_logits is on meta: must be on cpu"),
        (S, T.clone().requires_grad_(), Y, {}, ValueError, r"teacher_logits.requires_grad=True: .*torch.no_grad\(\)"),
        (S, Y, None, {}, ValueError, r"target=None: must be given with ce_weight=0.1 .*; type loss\((stud|feat)"),
        # student
        (S.long(), T, Y, {}, TypeError, "student_logits: must be a floating tensor, got torch.int64"),
        (S[:, :0], T[:, :0], Y, {}, ValueError, r"student_logits has shape \(4, 0\): .* K ≥ 1"),
    ],
)
def test_wrong_tensors(student, teacher, target, settings, error, message, backend):
    if message.startswith(VALUES) and backend == "triton":
        pytest.skip("a check that reads values would make the host wait for the GPU")
    loss = DistillLoss(backend=backend, **settings)
    with pytest.raises(error, match=message) as caught:
        loss(student, teacher, target)
    assert "\n" not in str(caught.value)
    if not message.startswith("student"):  # a head that is the identity makes the same logits
        with pytest.raises(error, match=message):
            LinearDistillLoss(backend=backend, **settings)(student, torch.eye(3), target, teacher_logits=teacher)


@pytest.mark.parametrize("ignore_index", [-100, 0, 1])
def test_without_cross_entropy_or_target_every_position_counts(ignore_index, backend):
    if backend == "triton":
        pytest.skip("runs the kernel")
    settings = {"ce_weight": 0, "ignore_index": ignore_index, "backend": backend}
    softened = (S / 4).log_softmax(-1), (T / 4).log_softmax(-1)
    expected = 0.9 * 16 * F.kl_div(*softened, reduction="batchmean", log_target=True)
    torch.testing.assert_close(DistillLoss(**settings)(S, T), expected)
    torch.testing.assert_close(LinearDistillLoss(**settings)(S, torch.eye(3), teacher_logits=T), expected)


def test_without_a_teacher_its_logits_are_not_used():
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_teacher_of_probabilities_warns(dtype):
    probabilities = T.double().softmax(-1).to(dtype)
    for shape in ((4, 3), (2, 2, 3)):
        with pytest.warns(UserWarning, match=r"teacher_logits look like probabilities: .*\.log\(\)") as seen:
            DistillLoss()(S.reshape(shape), probabilities.reshape(shape), Y.reshape(shape[:-1]))
        assert [warning.filename for warning in seen] == [__file__]


def test_logits_do_not_warn():
    one_row = T.clone()
    one_row[0] = T[0].softmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for teacher in (T, T.log_softmax(-1), torch.zeros_like(T), one_row, T * NAN):
            distill_loss(S, teacher, Y)
        distill_loss(S[:, :1], torch.ones(4, 1), Y * 0)  # one class: 1.0 is as good a logit as any
        distill_loss(S[:0], T[:0], Y[:0])


def test_values_are_not_checked_where_they_cannot_be_read_but_shapes_are():
    compiled = torch.compile(distill_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(S, T.softmax(-1), Y), distill_loss(S, T.softmax(-1).log().exp() + 7, Y))
    assert torch.func.vmap(distill_loss)(S, T.softmax(-1), Y).shape == (4,)
    assert distill_loss(S.to("meta"), T.to("meta"), Y.to("meta")).is_meta
    with pytest.raises(ValueError, match=r"teacher_logits has shape"):
        torch.func.vmap(distill_loss)(S, T[:, :2], Y)


def test_no_gradient_reaches_the_teacher_under_torch_func():
    with pytest.raises(ValueError, match=r"teacher_logits.requires_grad=True"):
        torch.func.grad(distill_loss, argnums=(0, 1))(S, T, Y)


def test_an_output_given_as_logits_is_told_about_its_logits():
    teacher = Teacher(torch.nn.Linear(5, 3))
    with pytest.raises(TypeError, match=r"teacher_logits: must be a floating tensor, got Output; pass its \.logits"):
        distill_loss(torch.zeros(2, 3), teacher(torch.zeros(2, 5)), torch.tensor([0, 1]))
