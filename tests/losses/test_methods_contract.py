"""What every method keeps to, whatever it computes. A new method is tested here without being named."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from method_batches import batch, built, call, draw, gradients, leaf, leaves, take, with_leaves

from kd.losses.methods.base import IGNORE, METHODS
from kd.losses.methods.registry import library, names

SMALL = {"crd": {"num_negatives": 6, "embed_dim": 8}, "cc": {"embed_dim": 8}}

# Every method with its defaults, and with the authors' code where it has that switch.
VARIANTS = {name: (name, SMALL.get(name, {})) for name in sorted(names())}
for name, method in sorted(library().items()):
    if "released" in method.defaults() and name != "online_label_smoothing":  # its first epoch would be all zeros
        VARIANTS[f"{name} released"] = (name, SMALL.get(name, {}) | {"released": True})
VARIANTS |= {
    "at of power 4": ("at", {"power": 4.0}),
    "label_smoothing others": ("label_smoothing", {"smoothing": "others"}),
    "lskd of ctkd": ("lskd", {"method": "ctkd"}),
    "lskd of dist": ("lskd", {"method": "dist"}),
}


def those(needs):
    """The variants whose `needs` are such."""
    made = {variant: library()[name](**settings) for variant, (name, settings) in VARIANTS.items()}
    return pytest.mark.parametrize("variant", [variant for variant, method in made.items() if needs(method.needs)])


every = those(lambda needs: True)
of_logits_alone = those(lambda needs: needs <= {"teacher", "target", "labels", "batch"})
of_features = those(lambda needs: needs & {"maps", "embedding"})

# At student = teacher, where the 1e-8 of dist's code shows. What goes
# through a learned layer first is at no such point.
ZERO_AT_TEACHER = {
    *("kd", "reverse_kl", "gjsd", "dkd", "logit_mse", "ctkd", "dist", "mlkd", "tf_self", "tf_self released"),
    *("mlkd released", "lskd released"),
    *("lskd", "lskd of ctkd", "lskd of dist", "at", "at released", "at of power 4", "nst", "fsp", "fsp released"),
    *("sp", "pkt", "pkt released", "rkd", "rkd released", "cc"),
}
STATIONARY_AT_TEACHER = ZERO_AT_TEACHER | {"wsl", "wsl released"}
NEITHER_AT_TEACHER = {"dist released", "ats", "hard", "nkd", "rld", "smoothed_teacher", "ttm", "wttm"}
# By definition a part is held constant in the gradient, so that it is not the value's; their own tests say what it is.
CONSTANT_PART = {"wsl", "wsl released", "dml"}


def ready(variant, seen, **more):
    name, settings = VARIANTS[variant]
    return built(name, seen, **settings, **more)


def values(variant, seen):
    return call(ready(variant, seen), seen)


# ---- values and gradients


@every
def test_the_gradient_is_that_of_finite_differences(variant):
    """Along a drawn direction of all that the student gives and of all learned parameters."""
    seen = batch()
    method = ready(variant, seen)
    torch.manual_seed(1)
    method.evaluate(seen)  # constants of a first batch are set
    state = copy.deepcopy(method.state_dict())
    learned = {} if "ctkd" in variant else dict(method.named_parameters())  # ctkd reverses the gradient of its own
    points = [*leaves(method, seen), *learned.values()]
    directions = [draw(*x.shape, seed=i + 5) for i, x in enumerate(points)]
    moves = dict(zip(learned, directions[len(points) - len(learned) :], strict=True))
    torch.manual_seed(1)
    slopes = torch.autograd.grad(method.evaluate(seen).sum(), points, allow_unused=True)
    along = sum((g * d).sum() for g, d in zip(slopes, directions, strict=True) if g is not None)

    def at(way):
        tensors = [(x + way * d).detach() for x, d in zip(leaves(method, seen), directions, strict=False)]
        method.load_state_dict({key: x + way * moves.get(key, 0) for key, x in state.items()})
        return call(method, with_leaves(method, seen, tensors)).sum()

    method.load_state_dict(state)
    numeric = ((at(1e-6) - at(-1e-6)) / 2e-6).detach()
    assert along.abs() > 1e-9
    if variant not in CONSTANT_PART:
        torch.testing.assert_close(along, numeric, rtol=1e-5, atol=1e-8)


@every
def test_a_value_is_of_its_row_alone_unless_declared_otherwise(variant):
    """So the values of a split batch are those of the whole, and their sums add up."""
    seen = batch()
    method = ready(variant, seen).eval()  # in training, batch normalisation joins the rows of "hint released"
    value = call(method, seen)
    if "batch" in method.needs:
        assert value.shape == ()
        return
    parts = [call(method, take(seen, rows)) for rows in (slice(0, 1), slice(1, 3), slice(3, 5))]
    torch.testing.assert_close(torch.cat(parts), value, rtol=1e-9, atol=1e-11)


@those(lambda needs: "index" not in needs)  # crd draws negatives for every example
def test_the_order_of_the_batch_changes_nothing(variant):
    seen, order = batch(), torch.tensor([2, 0, 3, 1, 4])
    method = ready(variant, seen)
    here, there = call(method, seen), call(method, take(seen, order))
    if variant == "cc released":  # neighbours in the batch, as its docstring says
        assert (there / here - 1).abs() > 1e-3
    else:
        torch.testing.assert_close(there, here if "batch" in method.needs else here[order], rtol=1e-9, atol=1e-11)


@of_logits_alone
def test_classes_may_be_permuted_and_rows_shifted(variant):
    """And a shift changes nothing exactly where the rows of the gradient sum to 0."""
    seen = batch()
    method = ready(variant, seen)
    here, order = call(method, seen), torch.tensor([3, 0, 2, 1])
    student, teacher = (replace(v, logits=v.logits[:, order]) for v in seen.views)
    there = call(method, replace(seen, student=student, teacher=teacher, target=order.argsort()[seen.target]))
    torch.testing.assert_close(there, here, rtol=1e-9, atol=1e-11)
    if variant == "logit_mse":  # regression on the logits themselves
        return
    of_teacher = 0 if variant == "ats" else draw(5, 1, seed=4)  # two temperatures see the shift: its docstring
    student = replace(seen.student, logits=seen.student.logits + draw(5, 1, seed=3))
    teacher = replace(seen.teacher, logits=seen.teacher.logits + of_teacher)
    torch.testing.assert_close(
        call(method, replace(seen, student=student, teacher=teacher)), here, rtol=1e-9, atol=1e-9
    )
    (slope,) = gradients(method, here.sum(), seen)
    assert slope.sum(-1).abs().max() < 1e-11


# ---- precision


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_are_those_of_float64_in_any_precision(variant, dtype):
    seen = batch(dtype=dtype)
    method = ready(variant, seen)
    value = call(method, seen)
    assert value.dtype == torch.float32
    student, teacher = (v.map(lambda x: leaf(x.double())) for v in seen.views)
    exact = call(method.double(), replace(seen, student=student, teacher=teacher, images=seen.images.double()))
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-4)
    if dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(call(ready(variant, seen), seen), value)


EXTREMES = [
    [1e4, -1e4, 0.0, 0.0],
    [-1e4, 1e4, 0.0, -1e4],
    [1e4, 1e4, -1e4, 1e4],
    [30.0, 0.0, 0.0, -30.0],
    [0.0, 0.0, 0.0, 0.0],
]


@every
def test_extreme_logits_in_half_precision_give_finite_values_and_gradients(variant):
    z = torch.tensor(EXTREMES).half()
    plain = batch(len(z), dtype=torch.float16)
    for teacher, label in ((z.flip(0), 0), (z.roll(1, 0), 3)):
        student, taught = replace(plain.student, logits=leaf(z)), replace(plain.teacher, logits=teacher)
        seen = replace(plain, student=student, teacher=taught, target=torch.full((len(z),), label))
        first = plain if VARIANTS[variant][0] == "simkd" else seen  # its `build` checks that the classifier fits
        method = ready(variant, first)
        with torch.autocast("cpu", dtype=torch.float16):
            value = call(method, seen)
        assert value.isfinite().all()
        assert all(g.isfinite().all() for g in gradients(method, value.mean(), seen))


@of_features
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_zero_and_huge_features_give_finite_values_and_gradients(variant, scale):
    plain = batch(dtype=torch.float32)
    method = ready(variant, plain)
    student, teacher = (v.map(lambda x: scale * x.detach()) for v in plain.views)
    seen = replace(plain, student=student.map(leaf), teacher=teacher)
    seen = with_leaves(method, seen, [leaf(x[[0, 0, 2, 3, 4]]) for x in leaves(method, seen)])  # two equal rows
    value = call(method, seen)
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(method, value.sum(), seen))


@every
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_nan_stays_nan(variant, who):
    """In the row where it is, and in no other that is independent; where the method does not look, nowhere."""
    seen, spoilt = batch(), torch.arange(5) == 1

    def spoil(x):
        return x.detach().masked_fill(spoilt.view(-1, *[1] * (x.ndim - 1)) & (torch.arange(x.shape[-1]) == 0), math.nan)

    method = ready(variant, seen).eval()
    value = call(method, replace(seen, **{who: getattr(seen, who).map(spoil)}))
    if who == "teacher" and "teacher" not in method.needs:
        assert torch.equal(value, call(method, seen))
    else:
        assert value.isnan().tolist() == (True if "batch" in method.needs else spoilt.tolist())


# What takes the mean of the logits, or smooths over all classes, cannot have a class at minus infinity.
MASKED = ["ctkd", "dkd", "gjsd", "hard", "kd", "nkd", "reverse_kl", "rld", "tf_self", "ttm", "wsl", "wttm"]


@pytest.mark.parametrize("name", MASKED)
def test_a_class_masked_in_both_networks_counts_nothing(name):
    """Minus infinity, as a classifier for some of the classes gives it."""
    seen = batch(k=5)
    seen = replace(seen, target=seen.target % 4)
    four = replace(seen, **{who: replace(getattr(seen, who), logits=getattr(seen, who).logits[:, :4]) for who in WHO})
    masked = {
        who: replace(getattr(seen, who), logits=leaf(F.pad(getattr(four, who).logits, (0, 1), value=-math.inf)))
        for who in WHO
    }
    seen = replace(seen, **masked)
    value = values(name, seen)
    torch.testing.assert_close(value, values(name, four))
    (slope,) = torch.autograd.grad(value.sum(), seen.student.logits)
    assert slope.isfinite().all()
    assert (slope[:, 4] == 0).all()


WHO = ("student", "teacher")

# ---- the teacher


@pytest.mark.parametrize("variant", sorted(STATIONARY_AT_TEACHER | NEITHER_AT_TEACHER))
def test_where_the_student_is_the_teacher(variant):
    seen = batch(same=True)
    method = ready(variant, seen)
    value = call(method, seen)
    slope = max(g.abs().max().item() for g in gradients(method, value.sum(), seen))
    # pkt released adds 1e-7 to its probabilities.
    assert (slope < (1e-7 if variant == "pkt released" else 1e-9)) == (variant in STATIONARY_AT_TEACHER)
    assert (value.abs().max() < 1e-9) == (variant in ZERO_AT_TEACHER)
    assert values(variant, batch(seed=3)).abs().max() > 1e-6


@every
def test_no_gradient_reaches_the_teacher_and_inputs_are_left_as_they_were(variant):
    seen = batch()
    seen = replace(seen, teacher=seen.teacher.map(leaf))
    tensors = [x for v in seen.views for x in (v.logits, *v.maps, v.embedding, v.weight, v.bias)]
    tensors += [seen.target, seen.index, seen.images]
    before = [x.detach().clone() for x in tensors]
    values(variant, seen).sum().backward()
    assert all(torch.equal(x, b) for x, b in zip(tensors, before, strict=True))
    assert all(x.grad is None for x in tensors[5:])


# ---- targets and batches


@every
def test_probability_targets(variant):
    seen = batch()
    method = ready(variant, seen)
    onehot = replace(seen, target=F.one_hot(seen.target, 4).double())
    if "labels" in method.needs:
        with pytest.raises(ValueError, match=f"^{method.name}: needs class labels, not probabilities"):
            call(method, onehot)
        return
    torch.testing.assert_close(call(method, onehot), call(method, seen), rtol=1e-12, atol=1e-12)
    mixed = call(method, replace(seen, target=draw(5, 4, seed=9).softmax(-1)))
    assert mixed.isfinite().all()


@every
def test_ignored_labels(variant):
    seen, ignored = batch(), torch.tensor([False, True, False, True, False])
    part = replace(seen, target=seen.target.masked_fill(ignored, IGNORE))
    method = ready(variant, seen).eval()
    if "batch" in method.needs:
        with pytest.raises(ValueError, match=f"^{method.name}: compares examples with each other and cannot ignore"):
            call(method, part)
        return
    for tensor in (part.student.logits, *part.student.maps, part.student.embedding):
        tensor.data[ignored] = math.nan  # whatever is there must not matter
    value, kept = call(method, part), call(method, take(part, ~ignored))
    assert (value[ignored] == 0).all()
    torch.testing.assert_close(value[~ignored], kept, rtol=1e-9, atol=1e-11)
    assert all((g[ignored] == 0).all() for g in gradients(method, value.sum(), part))
    assert (call(method, replace(part, target=torch.full((5,), IGNORE))) == 0).all()


@every
def test_small_batches(variant):
    seen = batch()
    method = ready(variant, seen)
    for n in (0, 1, 2):
        if "batch" in method.needs and n < 2:
            with pytest.raises(ValueError, match=f"^{method.name}: .* a batch of {n} is too small"):
                call(method, take(seen, slice(0, n)))
        else:
            assert call(method, take(seen, slice(0, n))).isfinite().all()
    two_classes = batch(k=2)
    value = call(method := ready(variant, two_classes), two_classes)
    assert value.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(method, value.sum(), two_classes))


@every
def test_what_is_missing_is_named(variant):
    seen = batch()
    method = ready(variant, seen)
    if "teacher" in method.needs:
        with pytest.raises(ValueError, match=f"^{method.name}: needs the teacher"):
            call(method, replace(seen, teacher=None))
    else:
        assert torch.equal(call(method, replace(seen, teacher=None)), call(method, seen))
    for need in sorted(method.needs & {"maps", "embedding", "weight"}):
        own_classifier_is_unused = need == "weight" and method.classifies
        for who in WHO[own_classifier_is_unused:]:
            bare = replace(getattr(seen, who), **{need: () if need == "maps" else None})
            with pytest.raises(ValueError, match=f"^{method.name}: needs the {need} of the {who}"):
                call(method, replace(seen, **{who: bare}))
    for need in sorted(method.needs & {"index", "images"}):
        with pytest.raises(ValueError, match=f"^{method.name}: needs the {need}"):
            call(method, replace(seen, **{need: None}))


WRONG = {
    r"at: student's logits of shape \(5, 4\): must be \(3, K\)": lambda seen: replace(seen, target=seen.target[:3]),
    r"at: target of shape \(5, 1\)": lambda seen: replace(seen, target=seen.target[:, None]),
    "target: must be int64 labels": lambda seen: replace(seen, target=seen.target.int()),
    "target has label 4: must be 0..3": lambda seen: replace(seen, target=seen.target * 0 + 4),
    "student has 1 maps and teacher 2": lambda seen: replace(seen, student=replace(seen.student, maps=[draw(5)])),
    r"at: teacher's logits of shape \(2, 4\)": lambda seen: replace(seen, teacher=take(seen, slice(0, 2)).teacher),
}


@pytest.mark.parametrize("says", WRONG)
def test_what_cannot_be_right_is_said(says):
    with pytest.raises((TypeError, ValueError), match=rf"^{says}"):
        call(ready("at", batch()), WRONG[says](batch()))


@every
def test_a_teacher_of_other_classes_is_refused_where_logits_are_all_there_is(variant):
    seen = batch()
    method = ready(variant, seen)
    other = replace(seen, teacher=replace(seen.teacher, logits=seen.teacher.logits[:, :3]))
    if {"teacher"} <= method.needs <= {"teacher", "target", "labels", "batch"}:
        with pytest.raises(ValueError, match=f"^{method.name}: student has 4 classes and teacher 3: must be equal"):
            call(method, other)
    else:
        assert torch.equal(call(method, other), call(method, seen))


# ---- learned parts and state


def train(method, seeds):
    """A few steps on different batches, an epoch's end, and the values on the way."""
    optimizer = torch.optim.SGD([*method.parameters(), torch.zeros((), requires_grad=True)], lr=0.01, momentum=0.0)
    seen_values = []
    for seed in seeds:
        torch.manual_seed(seed)
        optimizer.zero_grad()
        value = method.evaluate(batch(seed=seed))
        value.sum().backward()
        optimizer.step()
        seen_values.append(value.detach())
    method.end_epoch()
    return seen_values


@every
def test_a_saved_and_loaded_method_goes_on_identically(variant):
    method = ready(variant, batch())
    train(method, (1, 2))
    other = ready(variant, batch(), seed=99)
    other.load_state_dict(copy.deepcopy(method.state_dict()))
    for mine, theirs in zip(train(method, (3, 4, 5)), train(other, (3, 4, 5)), strict=True):
        assert torch.equal(mine, theirs)


# ---- settings and words


@pytest.mark.parametrize(
    ("name", "field", "ends"),
    [
        ("mlkd", "temperatures", ((), (4.0, -2.0), (math.nan,))),
        ("cc", "gamma", (math.nan, math.inf, True)),
        ("lskd", "method", ("kdd",)),
        ("generalized_smoothing", "label_smoothing", (1.1,)),
        ("vid", "initial_variance", (1e-5,)),
        ("crd", "momentum", (-0.1, 1.0)),
    ],
)
def test_ranges_end_where_the_docstrings_say(name, field, ends):
    for value in ends:
        with pytest.raises(ValueError, match=re.escape(f"{name}.{field}={value!r}: must be ")):
            METHODS[name](**{field: value})


@pytest.mark.parametrize("name", sorted(names()))
def test_the_docstring_names_every_field(name):
    documented = set(re.findall(r"^        (\w+): ", METHODS[name].__doc__ or "", re.MULTILINE))
    assert METHODS[name].defaults().keys() <= documented
