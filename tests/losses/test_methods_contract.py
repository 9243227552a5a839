"""What every method keeps to, whatever it computes. A new method is one more row in ROWS; without it this is red."""

import copy
import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.gradcheck import GradcheckError

import kd.losses.methods
from kd.losses.methods.base import IGNORE, METHODS, Method, Seen, Setup, View, batch_mean
from kd.losses.reference import wide_dtype

for module in pkgutil.iter_modules(kd.losses.methods.__path__, "kd.losses.methods."):
    importlib.import_module(module.name)


@dataclass(frozen=True)
class Row:
    """What a method declares to these tests beside its class."""

    # At student = teacher: "zero" (and so stationary), "stationary" alone, or "neither"; "-" for one without a teacher.
    at_teacher: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    learns: bool = False  # has parameters of its own
    constant_part: bool = False  # by definition holds a part constant in its gradient, which is then not the value's
    alone: str = "finite"  # what a batch of one gives: "finite", or "error", a ValueError that says so


def new_peer(seen: Seen):
    return nn.Sequential(nn.Flatten(), nn.Linear(seen.images[0].numel(), seen.student.logits.shape[1]))


# ======== one row per registered method ========
ROWS: dict[str, Row] = {
    # logits
    "ats": Row("neither"),
    "ctkd": Row("zero", learns=True),
    "dist": Row("zero"),
    "dkd": Row("zero"),
    "gjsd": Row("zero"),
    "hard": Row("neither"),
    "kd": Row("zero"),
    "logit_mse": Row("zero"),
    "lskd": Row("zero"),
    "mlkd": Row("zero"),
    "nkd": Row("neither"),
    "reverse_kl": Row("zero"),
    "rld": Row("neither"),
    "smoothed_teacher": Row("neither"),
    "ttm": Row("neither"),
    "wsl": Row("stationary", constant_part=True),
    "wttm": Row("neither"),
    # features; what goes through a learned layer first is not at its least where student and teacher agree
    "at": Row("zero"),
    "cc": Row("zero", alone="error"),
    "crd": Row("neither", {"num_negatives": 6, "embed_dim": 8}, learns=True),
    "fsp": Row("zero"),
    "hint": Row("neither", learns=True),
    "nst": Row("zero"),
    "ofd": Row("neither", learns=True),
    "pkt": Row("zero", alone="error"),
    "reviewkd": Row("neither", learns=True, alone="error"),
    "rkd": Row("zero", alone="error"),
    "simkd": Row("neither", learns=True),
    "sp": Row("zero", alone="error"),
    "vid": Row("neither", learns=True),
    # hard labels
    "confidence_penalty": Row("-"),
    "dml": Row("-", learns=True, constant_part=True),  # each network is constant to the other
    "flsd53": Row("-"),
    "focal": Row("-"),
    "generalized_smoothing": Row("-"),
    "label_smoothing": Row("-"),
    "maxsup": Row("-"),
    "online_label_smoothing": Row("-"),
    "tf_reg": Row("-"),
    "tf_self": Row("zero"),
}
# ===============================================

OURS = {name: method for name, method in METHODS.items() if method.__module__.startswith("kd.")}
WITH_TEACHER = [name for name in ROWS if ROWS[name].at_teacher != "-"]
every_method = pytest.mark.parametrize("name", ROWS)

SAMPLES = 20  # in the training set that the methods are told of


def test_every_registered_method_has_a_row_and_no_row_is_left_over():
    assert set(ROWS) == set(OURS), "add the method to ROWS in this file"


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def view(n, k, seed):
    """Everything that a network can give: two maps, from shallow to deep, the embedding and its classifier.

    The embedding is the average of the deep map, and the classifier gives the logits from it.
    """
    logits, embedding = 3 * draw(n, k, seed=seed), draw(n, 6, seed=seed + 3)
    weight, bias = draw(k, 6, seed=seed + 4), draw(k, seed=seed + 5)
    embedding += (logits - F.linear(embedding, weight, bias)) @ torch.linalg.pinv(weight).T
    shallow, deep = draw(n, 3, 4, 4, seed=seed + 1), draw(n, 6, 2, 2, seed=seed + 2)
    deep += (embedding - deep.mean((2, 3)))[..., None, None]
    return View(logits, [shallow, deep], embedding, weight, bias)


def changed(v: View, change) -> View:
    """The view with every tensor changed."""
    others = [None if x is None else change(x) for x in (v.embedding, v.weight, v.bias)]
    return View(change(v.logits), [change(m) for m in v.maps], *others)


def leaf(x):
    return x.detach().clone().requires_grad_()


def inputs(n=5, k=4, seed=0, same=False, dtype=torch.float64) -> Seen:
    """A batch with everything in it; the student's tensors take gradients. `same`: the teacher gave the same."""
    student, teacher = view(n, k, seed), view(n, k, seed if same else seed + 10)
    y = torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))
    student, teacher = (changed(v, lambda x: x.to(dtype)) for v in (student, teacher))
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:n]
    images = draw(n, 3, 4, 4, seed=seed + 30).to(wide_dtype(student.logits))  # never narrowed, as in the loop
    return Seen(changed(student, leaf), teacher, y, order, 1.0, 4, images)


def rows_of(seen: Seen, rows) -> Seen:
    """Some examples of the batch."""

    def pick(v: View) -> View:
        return replace(v, logits=v.logits[rows], maps=[m[rows] for m in v.maps], embedding=v.embedding[rows])

    parts = {"target": seen.target[rows], "index": seen.index[rows], "images": seen.images[rows]}
    return replace(seen, student=pick(seen.student), teacher=pick(seen.teacher), **parts)


def leaves(name, seen: Seen) -> list[torch.Tensor]:
    """The student's tensors that the method says it looks at, logits always."""
    student, needs = seen.student, made(name).needs
    found = [student.logits]
    found += student.maps if "maps" in needs else []
    found += [student.embedding] if "embedding" in needs else []
    return found


def with_leaves(seen: Seen, name, tensors) -> Seen:
    """The batch with other tensors in place of `leaves`."""
    needs, rest = made(name).needs, list(tensors)
    student = replace(seen.student, logits=rest.pop(0))
    if "maps" in needs:
        student = replace(student, maps=[rest.pop(0) for _ in student.maps])
    if "embedding" in needs:
        student = replace(student, embedding=rest.pop(0))
    return replace(seen, student=student)


def made(name) -> Method:
    return METHODS[name](**ROWS[name].settings)


def ready(name, seen: Seen, seed=0) -> Method:
    """The method with its learned parts made, in the precision of the batch, or float32 where that is less."""
    torch.manual_seed(seed)
    method = made(name)
    dtype = torch.float64 if seen.student.logits.dtype == torch.float64 else torch.float32
    wide = [changed(v, lambda x: x.detach().to(dtype)) for v in (seen.student, seen.teacher)]
    method.build(Setup(replace(seen, student=wide[0], teacher=wide[1]), SAMPLES, new_peer(seen)))
    return method.to(dtype)


def call(method: Method, seen: Seen) -> torch.Tensor:
    """Its values, with no trace of the call left in it, and the same draws each time."""
    torch.manual_seed(1)
    return copy.deepcopy(method)(seen)


def values(name, seen: Seen) -> torch.Tensor:
    return call(ready(name, seen), seen)


def gradients(name, value, seen: Seen) -> list[torch.Tensor]:
    found = torch.autograd.grad(value, leaves(name, seen), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves(name, seen), strict=True)]


# ---- values and gradients


@every_method
def test_gradient_by_finite_differences(name):
    seen = inputs(n=4, k=3)
    method = ready(name, seen)

    def function(*x):
        return call(method, with_leaves(seen, name, x))

    if ROWS[name].constant_part:  # its own tests say what the gradient is
        with pytest.raises(GradcheckError):
            torch.autograd.gradcheck(function, leaves(name, seen))
    else:
        assert torch.autograd.gradcheck(function, leaves(name, seen))
    assert max(g.abs().max() for g in gradients(name, call(method, seen).sum(), seen)) > 0


@every_method
def test_a_value_is_of_its_row_alone_unless_declared_otherwise(name):
    seen = inputs()
    method = ready(name, seen)
    value = call(method, seen)
    if not method.per_example:
        assert value.shape == ()
        return
    assert value.shape == (5,)
    for i in range(5):
        for g in gradients(name, call(method, seen)[i], seen):
            others = torch.cat([g[:i], g[i + 1 :]])
            assert (others == 0).all()
        alone = call(method, rows_of(seen, slice(i, i + 1)))
        torch.testing.assert_close(alone, value[i : i + 1], rtol=1e-9, atol=1e-11)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_values_are_wide_and_right_in_any_precision(name, dtype):
    seen = inputs(dtype=dtype)
    value = values(name, seen)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = replace(
        seen,
        student=changed(seen.student, lambda x: leaf(x.double())),
        teacher=changed(seen.teacher, lambda x: x.double()),
        images=seen.images.double(),
    )
    method = ready(name, seen).double()  # the learned parts of the narrow one, to the last digit
    torch.testing.assert_close(value.double(), call(method, exact), rtol=1e-4, atol=1e-4)


EXTREMES = [
    [1e4, -1e4, 0.0, 0.0],
    [-1e4, 1e4, 0.0, -1e4],
    [1e4, 1e4, -1e4, 1e4],
    [30.0, 0.0, 0.0, 0.0],
    [0.0, 30.0, 0.0, -30.0],
    [0.0, 0.0, 0.0, 0.0],
    [1e4, 1e4, 1e4, 1e4],
]


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 4])
def test_finite_at_the_ends_of_half_precision_under_autocast(name, dtype, k):
    z = torch.tensor(EXTREMES)[:, :k].to(dtype)
    for teacher in (z, z.flip(0), z.roll(1, 0), z.roll(2, 1)):
        for label in range(k):
            plain = inputs(len(z), k, dtype=dtype)
            seen = replace(
                plain,
                student=replace(plain.student, logits=leaf(z)),
                teacher=replace(plain.teacher, logits=teacher),
                target=torch.full((len(z),), label),
            )
            first = plain if "weight" in METHODS[name].needs else seen  # such a `build` checks that the classifier fits
            with torch.autocast("cpu", dtype=dtype):
                value = call(ready(name, first), seen)
                loss = batch_mean(value, seen.target)
            assert value.isfinite().all()
            assert value.dtype == torch.float32
            for g in gradients(name, loss, seen):
                assert g.isfinite().all()


@every_method
def test_autocast_changes_nothing(name):
    seen = inputs(dtype=torch.float32)
    outside = values(name, seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = values(name, seen)
    assert torch.equal(inside, outside)


@every_method
@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_of_one(name, n):
    seen = inputs(n)
    if n == 1 and ROWS[name].alone == "error":
        with pytest.raises(ValueError, match=rf"^{name}: "):
            values(name, seen)
        return
    value = values(name, seen)
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(name, value.sum(), seen))


@every_method
def test_two_classes(name):
    seen = inputs(k=2)
    value = values(name, seen)
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(name, value.sum(), seen))


# ---- the teacher


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_where_the_student_is_the_teacher(name):
    seen = inputs(same=True)
    value = values(name, seen)
    slope = max(g.abs().max().item() for g in gradients(name, value.sum(), seen))
    size = value.abs().max().item()
    found = "neither" if slope > 1e-9 else "stationary" if size > 1e-9 else "zero"
    assert found == ROWS[name].at_teacher
    elsewhere = inputs(seed=3)
    assert values(name, elsewhere).abs().max() > 1e-6


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_gradient_reaches_the_teacher(name):
    seen = inputs()
    seen = replace(seen, teacher=changed(seen.teacher, leaf))
    teacher = [seen.teacher.logits, *seen.teacher.maps, seen.teacher.embedding, seen.teacher.weight, seen.teacher.bias]
    before = [x.detach().clone() for x in teacher]
    values(name, seen).sum().backward()
    assert all(x.grad is None for x in teacher)
    assert all(torch.equal(x, b) for x, b in zip(teacher, before, strict=True))


@every_method
def test_a_missing_teacher_is_an_error_exactly_where_one_is_needed(name):
    seen = inputs()
    method, alone = ready(name, seen), replace(seen, teacher=None)
    assert ("teacher" in method.needs) == (name in WITH_TEACHER)
    if name in WITH_TEACHER:
        with pytest.raises(ValueError, match=f"^{name}: needs a teacher"):
            call(method, alone)
    else:
        assert torch.equal(call(method, alone), call(method, seen))


@every_method
def test_whatever_else_is_needed_and_missing_is_an_error(name):
    seen = inputs()
    method = ready(name, seen)
    for need in sorted(method.needs & {"maps", "embedding", "weight"}):
        for who in ("student", "teacher"):
            bare = replace(getattr(seen, who), **{need: () if need == "maps" else None})
            with pytest.raises(ValueError, match=f"^{name}: needs {need} of the {who}"):
                call(method, replace(seen, **{who: bare}))
    for need in sorted(method.needs & {"index", "images"}):
        with pytest.raises(ValueError, match=f"^{name}: needs {need}"):
            call(method, replace(seen, **{need: None}))
    fewer = replace(seen, teacher=rows_of(seen, slice(0, 2)).teacher)
    if name in WITH_TEACHER:
        with pytest.raises(ValueError, match="teacher's logits of shape"):
            call(method, fewer)


@pytest.mark.parametrize("name", WITH_TEACHER)
@pytest.mark.parametrize("classes", [1, 3])
def test_a_teacher_of_other_classes_is_an_error_where_logits_are_all_there_is(name, classes):
    seen = inputs()
    method = ready(name, seen)
    other = replace(seen, teacher=replace(seen.teacher, logits=seen.teacher.logits[:, :classes]))
    if method.needs & {"maps", "embedding", "weight"}:
        assert torch.equal(call(method, other), call(method, seen))
        return
    with pytest.raises(ValueError, match=f"^{name}: student has 4 classes and teacher {classes}: must be equal"):
        call(method, other)


# ---- targets


@every_method
def test_probability_targets(name):
    seen = inputs()
    onehot = replace(seen, target=F.one_hot(seen.target, 4).double())
    if not METHODS[name].soft_targets:
        with pytest.raises(ValueError, match=f"^{name}: needs class labels, not probabilities"):
            values(name, onehot)
        return
    torch.testing.assert_close(values(name, onehot), values(name, seen), rtol=1e-12, atol=1e-12)
    mixed = values(name, replace(seen, target=draw(5, 4, seed=9).softmax(-1)))
    assert mixed.isfinite().all()
    assert mixed.shape == values(name, seen).shape


@every_method
def test_ignored_labels(name):
    seen = inputs()
    ignored = torch.tensor([False, True, False, True, False])
    part = replace(seen, target=seen.target.masked_fill(ignored, IGNORE))
    method = ready(name, seen)
    if not method.per_example:
        with pytest.raises(ValueError, match=f"^{name}: compares examples with each other and cannot ignore"):
            call(method, part)
        return
    for tensor in (part.student.logits, *part.student.maps, part.student.embedding):
        tensor.data[ignored] = math.nan  # whatever is there must not matter
    value = call(method, part)
    assert (value[ignored] == 0).all()
    kept = call(method, rows_of(part, ~ignored))
    torch.testing.assert_close(value[~ignored], kept, rtol=1e-9, atol=1e-11)
    assert batch_mean(value, part.target).item() == pytest.approx(kept.mean().item(), rel=1e-9)
    for g in gradients(name, value.sum(), part):
        assert (g[ignored] == 0).all()
    nothing = replace(part, target=torch.full((5,), IGNORE))
    assert batch_mean(call(method, nothing), nothing.target) == 0


# ---- what cannot be right


def with_target(change):
    return lambda seen: replace(seen, target=change(seen.target))


def with_logits(who, change):
    return lambda seen: replace(
        seen, **{who: replace(getattr(seen, who), logits=change(getattr(seen, who).logits.detach()))}
    )


WRONG = {
    "a target for fewer": (with_target(lambda y: y[:3]), r"target of shape \(3,\) .*: must be \(5,\) int64 labels"),
    "a target for more": (
        with_target(lambda y: y.repeat(2)),
        r"target of shape \(10,\) .*: must be \(5,\) int64",
    ),
    "a column of labels": (
        with_target(lambda y: y[:, None]),
        r"target of shape \(5, 1\) .*: must be \(5,\) int64",
    ),
    "labels of 32 bits": (with_target(lambda y: y.int()), r"target.dtype=torch.int32: must be int64 labels"),
    "a label -1": (with_target(lambda y: y * 0 - 1), r"target has label -1: must be 0..3 or ignore_index=-100"),
    "a label K": (with_target(lambda y: y * 0 + 4), r"target has label 4: must be 0..3 or ignore_index=-100"),
    "labels as floats": (with_target(lambda y: y.double()), r"(target of shape|needs class labels)"),
    "probabilities of other classes": (
        with_target(lambda y: torch.ones(5, 3) / 3),
        r"(target of shape \(5, 3\) .*or \(5, 4\) probabilities|needs class labels)",
    ),
    "rows that are no probabilities": (
        with_target(lambda y: torch.ones(5, 4)),
        r"(target has a row that sums to 4|needs class labels)",
    ),
    "one row of logits": (
        with_logits("student", lambda z: z[0]),
        r"(student's logits of shape \(4,\)|teacher and student)",
    ),
    "sequences": (
        lambda seen: with_logits("teacher", lambda z: z[:, None])(with_logits("student", lambda z: z[:, None])(seen)),
        r"student's logits of shape \(5, 1, 4\) and torch.float64: must be floating, \(N, K\) with N = 5",
    ),
    "whole numbers": (
        with_logits("student", lambda z: z.long()),
        r"student's logits of .* torch.int64: must be floating",
    ),
}


@every_method
@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_right_is_one_line_of_the_methods(name, what):
    change, says = WRONG[what]
    seen = inputs()
    method = ready(name, seen)
    with pytest.raises(ValueError, match=rf"^{name}: {says}"):
        call(method, change(seen))


@every_method
def test_features_of_another_form_are_named(name):
    seen = inputs()
    method, student, teacher = ready(name, seen), seen.student, seen.teacher
    if "maps" in method.needs:
        flat = replace(student, maps=[m[:, :, 0] for m in student.maps])
        with pytest.raises(ValueError, match=rf"^{name}: student's map 0 of shape \(5, 3, 4\) .* \(N, C, H, W\)"):
            call(method, replace(seen, student=flat))
        fewer = replace(teacher, maps=[m[:1] for m in teacher.maps])
        with pytest.raises(ValueError, match=rf"^{name}: teacher's map 0 of shape \(1, 3, 4, 4\) .* with N = 5"):
            call(method, replace(seen, teacher=fewer))
    if "embedding" in method.needs:
        fewer = replace(teacher, embedding=teacher.embedding[:1])
        with pytest.raises(ValueError, match=rf"^{name}: teacher's embedding of shape \(1, 6\) .* \(N, D\) with N = 5"):
            call(method, replace(seen, teacher=fewer))


@every_method
def test_what_a_batch_of_none_gives(name):
    seen = rows_of(inputs(), slice(0, 0))
    method = ready(name, inputs())
    if method.per_example:
        assert call(method, seen).shape == (0,)
        return
    with pytest.raises(ValueError, match=f"^{name}: .*(empty|too small)"):
        call(method, seen)


@every_method
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_stays_nan(name, who):
    """In the row where it is, and in no other that is independent; where the method does not look, nowhere."""
    seen = inputs()
    view, spoilt = getattr(seen, who), torch.tensor([False, True, False, False, False])

    def spoil(x):
        return x.detach().masked_fill(spoilt.view(-1, *[1] * (x.ndim - 1)) & (torch.arange(x.shape[-1]) == 0), math.nan)

    bad = replace(view, logits=spoil(view.logits), maps=[spoil(m) for m in view.maps], embedding=spoil(view.embedding))
    method = ready(name, seen)
    value, without = call(method, replace(seen, **{who: bad})), call(method, seen)
    if who == "teacher" and name not in WITH_TEACHER:
        assert torch.equal(value, without)
    elif method.per_example:
        assert value.isnan().tolist() == spoilt.tolist()
        torch.testing.assert_close(value[~spoilt], without[~spoilt])
    else:
        assert value.isnan()


@every_method
def test_a_teacher_of_another_precision_is_computed_in_the_students(name):
    seen = inputs(dtype=torch.float32)
    teacher = changed(seen.teacher, lambda x: x.double())
    torch.testing.assert_close(values(name, replace(seen, teacher=teacher)), values(name, seen))


# What takes the mean of the logits, or smooths over all classes, cannot have a class at minus infinity.
MASKED = [
    "ctkd",
    "dist",
    "dkd",
    "gjsd",
    "hard",
    "kd",
    "mlkd",
    "nkd",
    "reverse_kl",
    "rld",
    "tf_self",
    "ttm",
    "wsl",
    "wttm",
]


@pytest.mark.parametrize("name", MASKED)
def test_a_class_masked_in_both_networks_counts_nothing(name):
    """Minus infinity, as a classifier for some of the classes gives it."""
    seen = inputs(k=5)
    seen = replace(seen, target=seen.target % 4)
    four = [replace(v, logits=v.logits.detach()[:, :4]) for v in (seen.student, seen.teacher)]
    masked = [replace(v, logits=F.pad(v.logits.detach()[:, :4], (0, 1), value=-math.inf)) for v in four]
    masked[0] = replace(masked[0], logits=leaf(masked[0].logits))
    if name in ("dist", "mlkd"):  # means over classes, of which one more is there
        assert values(name, replace(seen, student=masked[0], teacher=masked[1])).isfinite()
        return
    value = values(name, replace(seen, student=masked[0], teacher=masked[1]))
    torch.testing.assert_close(value, values(name, replace(seen, student=four[0], teacher=four[1])))
    (slope,) = torch.autograd.grad(value.sum(), masked[0].logits)
    assert slope.isfinite().all()
    assert (slope[:, 4] == 0).all()


# ---- learned parts and state


@every_method
def test_learned_parts_get_gradients(name):
    seen = inputs()
    method = ready(name, seen)
    parameters = dict(method.named_parameters())
    assert bool(parameters) == ROWS[name].learns
    torch.manual_seed(1)
    method(seen).sum().backward()
    for label, parameter in parameters.items():
        assert parameter.grad is not None, label
        assert parameter.grad.abs().sum() > 0, label
        assert label in method.state_dict()


def train(method, seeds):
    """A few steps on different batches, an epoch's end, and the values on the way."""
    optimizer = torch.optim.SGD([*method.parameters(), torch.zeros((), requires_grad=True)], lr=0.01, momentum=0.0)
    seen_values = []
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        value = method(inputs(seed=seed))
        value.sum().backward()
        optimizer.step()
        seen_values.append(value.detach())
    method.end_epoch()
    return seen_values


@every_method
def test_a_saved_and_loaded_method_goes_on_identically(name):
    method = ready(name, inputs())
    train(method, (1, 2))
    state = copy.deepcopy(method.state_dict())
    other = ready(name, inputs(), seed=99)
    other.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(method.state_dict().values(), other.state_dict().values(), strict=True)
    )
    for mine, theirs in zip(train(method, (3, 4, 5)), train(other, (3, 4, 5)), strict=True):
        assert torch.equal(mine, theirs)


@every_method
def test_inputs_are_left_as_they_were(name):
    seen = inputs()
    tensors = [*leaves(name, seen), seen.teacher.logits, *seen.teacher.maps, seen.target, seen.index, seen.images]
    before = [x.detach().clone() for x in tensors]
    values(name, seen).sum().backward()
    assert all(torch.equal(x, b) for x, b in zip(tensors, before, strict=True))


# ---- settings and words


@every_method
def test_a_number_that_is_none_is_refused_by_name(name):
    numbers = [f.name for f in dataclasses.fields(METHODS[name]) if isinstance(f.default, float)]
    for number in numbers:
        with pytest.raises(ValueError, match=number):
            METHODS[name](**{**ROWS[name].settings, number: math.nan})


@every_method
def test_presets_name_fields_and_weights(name):
    fields = set(inspect.signature(METHODS[name]).parameters)
    for preset, settings in METHODS[name].presets.items():
        assert {"weight", "ce_weight"} <= set(settings), preset
        assert settings["weight"] > 0, preset
        weights = {"weight", "ce_weight", "kd_weight", "warmup_epochs"}
        METHODS[name](**{key: value for key, value in settings.items() if key not in weights})
        assert set(settings) - weights <= fields, preset


# What the released configurations set, of which a wrong figure would train without an error. Read in
# hunto/image_classification_sota configs/strategies/distill/{dist_cifar,resnet_dist}.yaml and
# megvii-research/mdistiller configs/imagenet/r34_r18/reviewkd.yaml, mdistiller/engine/cfg.py.
CONFIGURATIONS = [
    ("dist", "cifar100", {"weight": 2.0, "ce_weight": 1.0, "temperature": 4.0}),
    ("dist", "imagenet", {"weight": 2.0, "ce_weight": 1.0, "temperature": 1.0}),
    ("reviewkd", "imagenet", {"weight": 1.0, "warmup_epochs": 1}),
    ("dkd", "imagenet", {"tckd_weight": 1.0, "nckd_weight": 0.5, "temperature": 1.0, "warmup_epochs": 1}),
    ("ofd", "imagenet", {"weight": 1e-4, "ce_weight": 1.0}),
]


@pytest.mark.parametrize(("name", "preset", "published"), CONFIGURATIONS)
def test_presets_are_the_released_configurations(name, preset, published):
    ours = vars(METHODS[name](**ROWS[name].settings)) | METHODS[name].presets[preset]
    assert {key: ours[key] for key in published} == published


@every_method
def test_the_docstring_has_a_formula_a_paper_and_says_where_it_is_zero(name):
    text = METHODS[name].__doc__ or ""
    assert "``" in text
    assert re.search(r"\b(19|20)\d\d\b", text)
    assert re.search(r"zero|stationary|minim", text, re.IGNORECASE)
    assert not {"alpha", "beta"} & {f.name for f in dataclasses.fields(METHODS[name])}
