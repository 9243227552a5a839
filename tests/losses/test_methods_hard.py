"""The hard-label methods against their authors' numbers, second writings, identities, and their state by hand."""

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_table import SECOND, TOLERANCE, Case, errors
from torch import nn

from kd import distill_loss
from kd.losses.methods.base import IGNORE, Seen, Setup, View, batch_mean
from kd.losses.methods.labels import (
    FLSD53,
    ConfidencePenalty,
    Focal,
    GeneralizedSmoothing,
    LabelSmoothing,
    MaxSup,
    OnlineLabelSmoothing,
)
from kd.losses.methods.teacher_free import DeepMutualLearning, TfReg, TfSelf

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "authors_hard.json").read_text())


def draw(n=6, k=5, seed=0, scale=3.0):
    return scale * torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(n=6, k=5, seed=0):
    return torch.randint(k, (n,), generator=torch.Generator().manual_seed(seed))


def seen(student, target, teacher=None, **more):
    return Seen(View(student), None if teacher is None else View(teacher), target, **more)


def value_and_grad(function, student):
    student = student.detach().clone().requires_grad_()
    value = function(student)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def assert_same(ours, theirs, student, tolerance=1e-12):
    """Value and gradient of two functions of the student's logits."""
    for a, b in zip(value_and_grad(ours, student), value_and_grad(theirs, student), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def ce(student, target):
    return F.cross_entropy(student, target, reduction="none")


# ---- the authors' numbers

# By key of the golden file: our method with the authors' settings, its weight, and that of the cross entropy.
AUTHORS = {
    "tf_ls": lambda h: (LabelSmoothing(0.1, "others"), 1.0, 0.0),
    "ls_uniform": lambda h: (LabelSmoothing(h["alpha"]), 1.0, 0.0),
    "maxsup_ls": lambda h: (LabelSmoothing(h["smoothing_rate"]), 1.0, -1.0),  # the regulariser alone
    "tf_kd": lambda h: (TfSelf(h["T"], released_code=True), h["alpha"], 1 - h["alpha"]),
    "tf_self": lambda h: (TfSelf(h["T"], released_code=True), h["alpha"] * h["multiplier"], 1 - h["alpha"]),
    "tf_reg": lambda h: (
        TfReg(0.99, h["reg_temperature"], released_code=True),
        h["reg_alpha"] * h["multiplier"],
        1 - h["reg_alpha"],
    ),
    "maxsup": lambda h: (MaxSup(h["begin_lambda"], h["end_lambda"]), 1.0, 1.0),
    "maxsup_lt": lambda h: (MaxSup(ramp="in_last"), 1.0, 1.0),
    "focal": lambda h: (Focal(h["gamma"]), 1.0, 0.0),
    "flsd53": lambda h: (FLSD53(h["gamma"]), 1.0, 0.0),
    "confpen": lambda h: (ConfidencePenalty(), h["weight"], 0.0),  # the penalty alone
}


def golden_case(case, method, name, loss, student, value, slopes=None):
    source = f"{case['repo']} {case['path']}"
    return Case(method, source, name, loss, student, *(None if x is None else tensor(x) for x in (value, slopes)))


def tensor(x):
    return torch.as_tensor(x, dtype=torch.float64)


def authors_cases():
    for case in GOLDEN["cases"]:
        if case["key"] == "ols":
            yield from ols_cases(case)
            continue
        data, hyper = GOLDEN["inputs"][case["inputs"]], case["hyper"]
        student, teacher = (tensor(data[name]) if name in data else None for name in "st")
        target = torch.tensor(data["y"])
        method, weight, ce_weight = AUTHORS[case["key"]](hyper)
        when = {"epoch": hyper.get("epoch", 0), "epochs": hyper.get("epochs", 1)}
        size = len(target) if hyper.get("reduction") == "sum" else 1

        def loss(z, t=teacher, y=target, size=size, method=method, weights=(weight, ce_weight), when=when):
            ours = batch_mean(method(seen(z, y, t, **when)), y)
            return size * (weights[0] * ours + weights[1] * ce(z, y).mean())

        expected = case["expected"]
        yield golden_case(case, method.name, case["id"], loss, student, expected["loss"], expected["grad_s"])


def ols_cases(case):
    """Every batch after all before it, and the table after every epoch."""
    epochs = [[(tensor(b["s"]), torch.tensor(b["y"])) for b in epoch] for epoch in GOLDEN["inputs"]["ols"]["epochs"]]

    def after(batches):
        """The method that has seen so many batches, and the ends of the epochs that they complete."""
        method = OnlineLabelSmoothing(start="zero")
        method.build(Setup(seen(*epochs[0][0]), 100))
        for epoch in epochs:
            for batch in epoch[:batches]:
                method(seen(*batch))
            if batches < len(epoch):
                break
            method.end_epoch()
            batches -= len(epoch)
        return method

    done = 0
    for e, (epoch, expected) in enumerate(zip(epochs, case["expected"]["epochs"], strict=True)):
        for n, (student, target) in enumerate(epoch):

            def loss(z, target=target, done=done):
                return 0.5 * ce(z, target).mean() + 0.5 * after(done)(seen(z, target)).mean()

            numbers = expected["batch_loss"][n], expected["batch_grad_s"][n]
            yield golden_case(case, "online_label_smoothing", f"{case['id']}:{e}:{n}", loss, student, *numbers)
            done += 1

        def of_table(_, done=done):
            return after(done).table

        yield golden_case(
            case, "online_label_smoothing", f"{case['id']}:{e}", of_table, student, expected["matrix_after"]
        )


AUTHORS_CASES = list(authors_cases())


@pytest.mark.parametrize("case", AUTHORS_CASES, ids=lambda case: case.name)
def test_authors_numbers(case):
    assert max(errors(case)) <= TOLERANCE


def test_every_stored_case_is_compared():
    assert {":".join(case.name.split(":")[:3]) for case in AUTHORS_CASES} >= {
        ":".join(case["id"].split(":")[:3]) for case in GOLDEN["cases"]
    }
    assert {case["key"] for case in GOLDEN["cases"]} == {*AUTHORS, "ols"}


# ---- label smoothing in its conventions


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_uniform_smoothing_by_its_identities(eps):
    s, y = draw(), labels()
    log_k = math.log(5)

    def kl_from_uniform(z):
        return -log_k - F.log_softmax(z, -1).mean(-1)

    def ours(z):
        return LabelSmoothing(eps)(seen(z, y))

    assert_same(ours, lambda z: F.cross_entropy(z, y, label_smoothing=eps, reduction="none"), s)
    assert_same(ours, lambda z: (1 - eps) * ce(z, y) + eps * (kl_from_uniform(z) + log_k), s)
    assert_same(ours, lambda z: ce(z, y) + eps * (z.gather(1, y[:, None]).squeeze(1) - z.mean(1)), s)
    _, grad = value_and_grad(ours, s)
    torch.testing.assert_close(grad, s.softmax(1) - (1 - eps) * F.one_hot(y, 5).double() - eps / 5, atol=1e-14, rtol=0)


def test_smoothing_is_distillation_from_a_uniform_teacher():
    s, y, eps = draw(), labels(), 0.3
    kd = distill_loss(s, torch.zeros_like(s), y, 1.0, kd_weight=eps, ce_weight=1 - eps, reduction="none")
    gap = LabelSmoothing(eps)(seen(s, y)) - kd
    torch.testing.assert_close(gap, torch.full_like(gap, eps * math.log(5)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("eps", "gap"), [(0.05, 5.25), (0.1, 4.51), (0.2, 3.71), (0.4, 2.77)])
def test_the_optimal_gap_of_smoothing(eps, gap):
    best = math.log(1 + (1 - eps) * 10 / eps)
    assert best == pytest.approx(gap, abs=0.005)
    s = best * F.one_hot(torch.tensor([3]), 10).double()
    value, grad = value_and_grad(lambda z: LabelSmoothing(eps)(seen(z, torch.tensor([3]))), s)
    assert grad.abs().max() < 1e-15
    q = np.full(10, eps / 10)
    q[3] += 1 - eps
    assert value.item() == pytest.approx(-(q * np.log(q)).sum(), rel=1e-13)  # the entropy of the target


def test_the_two_conventions_meet():
    s, y = draw(), labels()
    others = LabelSmoothing(0.08, "others")(seen(s, y))
    torch.testing.assert_close(others, LabelSmoothing(0.1)(seen(s, y)), rtol=1e-13, atol=0)  # 0.08 * 5/4
    q = torch.full((5,), 0.02, dtype=torch.float64)
    q[y[0]] = 0.92
    torch.testing.assert_close(others[0], -(q * s[0].log_softmax(0)).sum(), rtol=1e-13, atol=0)


def test_probability_targets_are_smoothed_linearly():
    s, a, b = draw(), labels(), labels(seed=1)
    mixed = 0.3 * F.one_hot(a, 5).double() + 0.7 * F.one_hot(b, 5).double()
    for method in (LabelSmoothing(0.2), LabelSmoothing(0.2, "others"), GeneralizedSmoothing(-1.5)):
        torch.testing.assert_close(method(seen(s, mixed)), 0.3 * method(seen(s, a)) + 0.7 * method(seen(s, b)))


@pytest.mark.parametrize("eps", [-8.0, -0.4, 0.0, 0.3, 1.0])
def test_generalised_smoothing_is_the_line_through_ce(eps):
    s, y = draw(), labels()

    def line(z):
        return ce(z, y) + eps / 0.1 * (F.cross_entropy(z, y, label_smoothing=0.1, reduction="none") - ce(z, y))

    assert_same(lambda z: GeneralizedSmoothing(eps)(seen(z, y)), line, s)


def test_negative_smoothing_has_no_lower_bound():
    y = torch.tensor([0])
    far = [GeneralizedSmoothing(-0.5)(seen(m * torch.eye(3)[:1], y)).item() for m in (10.0, 100.0, 1000.0)]
    assert far == pytest.approx([-0.5 * m * 2 / 3 for m in (10, 100, 1000)], abs=1e-4)


# ---- alternatives to smoothing


def test_confidence_penalty_is_the_divergence_from_uniform():
    s, y, b = draw(), labels(), 0.3

    def theirs(z):
        u = torch.full_like(z, -math.log(5))
        return ce(z, y) + b * (F.kl_div(u, F.log_softmax(z, 1), reduction="none", log_target=True).sum(1) - math.log(5))

    assert_same(lambda z: ce(z, y) + b * ConfidencePenalty()(seen(z, y)), theirs, s)


def test_confidence_penalty_at_its_ends():
    s = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, -1e4, 0.0]], dtype=torch.float64)
    value, grad = value_and_grad(lambda z: ConfidencePenalty()(seen(z, torch.tensor([0, 0]))), s)
    assert value.tolist() == pytest.approx([-math.log(4), 0])
    assert grad.abs().max() < 1e-15


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
def test_focal_by_its_formula(gamma):
    s, y = draw(), labels()

    def theirs(z):
        p = z.softmax(1).gather(1, y[:, None]).squeeze(1)
        return -((1 - p) ** gamma) * p.log()

    assert_same(lambda z: Focal(gamma)(seen(z, y)), ce_of(y) if gamma == 0 else theirs, s, 1e-10)


def ce_of(y):
    return lambda z: ce(z, y)


def test_focal_by_hand_and_where_the_label_is_certain():
    # p_y = 3/4 of two classes: (1/4)² log(4/3)
    s = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    assert Focal()(seen(s, torch.tensor([0]))).item() == pytest.approx(math.log(4 / 3) / 16, rel=1e-14)
    # 1 - p_y = exp(-m) up to exp(-2m), below float32's spacing at 1: value exp(-1.5 m), gradient -1.5 exp(-1.5 m)
    s = torch.tensor([[20.0, 0.0]])
    value, grad = value_and_grad(lambda z: Focal(0.5)(seen(z, torch.tensor([0]))), s)
    assert grad.isfinite().all()
    assert value.item() < 1e-10
    value, grad = value_and_grad(lambda z: Focal(0.5)(seen(z, torch.tensor([0]))), s.double())
    assert value.item() == pytest.approx(math.exp(-30), rel=1e-7)
    assert grad[0].tolist() == pytest.approx([-1.5 * math.exp(-30), 1.5 * math.exp(-30)], rel=1e-7)


@pytest.mark.parametrize(("p", "gamma"), [(0.05, 5), (0.199, 5), (0.201, 3), (0.499, 3), (0.501, 3), (0.9, 3)])
def test_flsd_chooses_gamma_by_the_probability(p, gamma):
    s = torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64)
    value, grad = value_and_grad(lambda z: FLSD53()(seen(z, torch.tensor([0]))), s)
    assert value.item() == pytest.approx(-((1 - p) ** gamma) * math.log(p), rel=1e-12)
    # d/dp of the branch's own focal loss, times dp/dz = p (1 - p): no gradient through the choice
    slope = gamma * (1 - p) ** (gamma - 1) * math.log(p) - (1 - p) ** gamma / p
    assert grad[0].tolist() == pytest.approx([slope * p * (1 - p), -slope * p * (1 - p)], rel=1e-10)


def test_flsd_fields_move_their_branch():
    low = torch.tensor([[math.log(1 / 9), 0.0]], dtype=torch.float64)  # p_y = 0.1
    y = torch.tensor([0])
    torch.testing.assert_close(FLSD53(low_gamma=1.7)(seen(low, y)), Focal(1.7)(seen(low, y)), rtol=1e-14, atol=0)
    torch.testing.assert_close(FLSD53(threshold=0.05, gamma=2.0)(seen(low, y)), Focal(2.0)(seen(low, y)))
    torch.testing.assert_close(FLSD53(gamma=2.0)(seen(low, y)), Focal(5.0)(seen(low, y)))


@pytest.mark.parametrize(
    ("ramp", "epoch", "epochs", "weight"),
    [
        ("after_last", 0.0, 10, 0.1),
        ("after_last", 5.9, 10, 0.15),  # whole epochs
        ("after_last", 9.5, 10, 0.19),
        ("in_last", 9.0, 10, 0.2),
        ("in_last", 0.5, 1, 0.1),
        ("after_last", 12.0, 10, 0.2),
    ],
)
def test_maxsup_by_hand(ramp, epoch, epochs, weight):
    s = torch.tensor([[3.0, 1.0, -1.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    method = MaxSup(ramp=ramp)
    value, grad = value_and_grad(lambda z: method(seen(z, torch.tensor([2, 0]), epoch=epoch, epochs=epochs)), s)
    assert value.tolist() == pytest.approx([2 * weight, 0], rel=1e-12)
    assert grad[0].tolist() == pytest.approx([weight * 2 / 3, -weight / 3, -weight / 3], rel=1e-12)


def test_maxsup_is_smoothing_where_the_prediction_is_right():
    s = draw()
    y = s.argmax(1)
    assert_same(lambda z: ce(z, y) + MaxSup()(seen(z, y)), lambda z: LabelSmoothing(0.1)(seen(z, y)), s)


# ---- virtual and own teachers: second writings in numpy


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [1.0, 6.0, 20.0])
def test_tf_self_is_the_papers_kl(temperature):
    s, t, y = draw(), draw(seed=1), labels()
    p, q = softmax(t.numpy() / temperature), softmax(s.numpy() / temperature)
    value, grad = value_and_grad(lambda z: TfSelf(temperature)(seen(z, y, t)), s)
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum(1), rtol=1e-11)
    np.testing.assert_allclose(grad, (q - p) / temperature, atol=1e-14)
    released = TfSelf(temperature, released_code=True)(seen(s, y, t))
    torch.testing.assert_close(released, value * temperature**2 / 5)
    kd = distill_loss(s, t, y, temperature, kd_weight=1, ce_weight=0, reduction="none")
    torch.testing.assert_close(released * 5, kd)


def test_tf_self_without_a_class_that_both_mask():
    s, t, y = draw(), draw(seed=1), labels(k=4)
    masked = [torch.cat([z, torch.full((6, 1), -math.inf, dtype=z.dtype)], 1) for z in (s[:, :4], t[:, :4])]
    value, grad = value_and_grad(lambda z: TfSelf()(seen(z, y, masked[1])), masked[0])
    expected, slope = value_and_grad(lambda z: TfSelf()(seen(z, y, t[:, :4])), s[:, :4])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, torch.cat([slope, torch.zeros(6, 1).double()], 1))


@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_tf_reg_is_the_papers_kl(temperature):
    s, y = draw(), labels()
    virtual = np.full((6, 5), 0.01 / 4)
    virtual[np.arange(6), y] = 0.99
    p = virtual ** (1 / temperature)
    p /= p.sum(1, keepdims=True)
    q = softmax(s.numpy() / temperature)
    value, grad = value_and_grad(lambda z: TfReg(0.99, temperature)(seen(z, y)), s)
    np.testing.assert_allclose(value, (p * np.log(p / q)).sum(1), rtol=1e-11)
    np.testing.assert_allclose(grad, (q - p) / temperature, atol=1e-14)
    # zero and stationary at the virtual teacher itself, whatever the temperature
    value, grad = value_and_grad(lambda z: TfReg(0.99, temperature)(seen(z, y)), torch.tensor(virtual).log() + 7)
    assert value.abs().max() < 1e-15
    assert grad.abs().max() < 1e-15


def test_tf_reg_at_temperature_one_is_smoothing():
    s, y = draw(), labels()
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 4))
    assert_same(lambda z: TfReg(0.9, 1.0)(seen(z, y)) + entropy, lambda z: LabelSmoothing(0.1, "others")(seen(z, y)), s)


def test_tf_reg_says_how_far_the_released_target_is():
    """The docstring's 1.05 and 1.58 at K = 100, read off the gradient at equal logits."""
    zeros, y = torch.zeros(1, 100, dtype=torch.float64), torch.tensor([7])
    ratios = []
    for method, factor in ((TfReg(), 20), (TfReg(released_code=True), 100)):
        _, grad = value_and_grad(lambda z, m=method: m(seen(z, y)), zeros)
        target = 0.01 - factor * grad[0]
        ratios.append((target[7] / target[0]).item())
    assert ratios == pytest.approx([(0.99 / (0.01 / 99)) ** 0.05, math.exp((0.99 - 0.01 / 99) / 20)], rel=1e-10)
    assert ratios == pytest.approx([1.58, 1.05], abs=0.005)


def test_tf_reg_takes_probabilities():
    s, y = draw(), labels()
    torch.testing.assert_close(TfReg()(seen(s, F.one_hot(y, 5).double())), TfReg()(seen(s, y)))


# ---- deep mutual learning


class Peer(nn.Module):
    """Logits as its parameters, row by row of the batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images):
        return self.logits[: len(images)]


def mutual(student, peer, target, **more):
    method = DeepMutualLearning()
    given = seen(student, target, images=torch.zeros(len(student), 1), **more)
    method.build(Setup(given, 100, Peer(peer)))
    return method, given


def second_cases():
    """Deep mutual learning by each network's own published objective, and negative smoothing by its line."""
    s, t, y = draw(), draw(seed=1), labels()
    p1, p2, onehot = softmax(s.numpy()), softmax(t.numpy()), np.eye(5)[y]
    nll = -np.log(p2[np.arange(6), y])
    value = (p2 * np.log(p2 / p1)).sum(1) + nll + (p1 * np.log(p1 / p2)).sum(1)

    def of_student(z):
        method, given = mutual(z, t, y)
        return method(given).sum()

    def of_peer(z):
        method, given = mutual(s, t, y)
        object.__setattr__(method.peer, "forward", lambda images: z)
        return method(given).sum()

    gradients = {"student": (of_student, s, p1 - p2), "peer": (of_peer, t, (p2 - onehot) + (p2 - p1))}
    for who, (loss, at, slopes) in gradients.items():
        yield Case("dml", SECOND, f"dml-{who}", loss, at, tensor(value.sum()), tensor(slopes))
    for eps in (-1.5, 0.3):
        value = (1 - eps) * -np.log(p1[np.arange(6), y]).sum() - eps * np.log(p1).mean(1).sum()

        def line(z, eps=eps):
            return GeneralizedSmoothing(eps)(seen(z, y)).sum()

        slopes = p1 - (1 - eps) * onehot - eps / 5
        yield Case("generalized_smoothing", SECOND, f"negative{eps}", line, s, tensor(value), tensor(slopes))
    for temperature in (1.0, 20.0):  # of Tf-KD as in the paper
        p = softmax(t.numpy() / temperature)
        virtual = np.where(onehot == 1, 0.99, 0.01 / 4) ** (1 / temperature)
        virtual /= virtual.sum(1, keepdims=True)
        q = softmax(s.numpy() / temperature)
        for method, of_teacher in ((TfSelf(temperature), p), (TfReg(0.99, temperature), virtual)):
            value = (of_teacher * np.log(of_teacher / q)).sum()

            def tf(z, method=method):
                return method(seen(z, y, t)).sum()

            slopes = (q - of_teacher) / temperature
            yield Case(method.name, SECOND, f"{method.name}{temperature}", tf, s, tensor(value), tensor(slopes))


SECOND_CASES = list(second_cases())
GOLDEN_CASES = AUTHORS_CASES + SECOND_CASES


@pytest.mark.parametrize("case", SECOND_CASES, ids=lambda case: case.name)
def test_a_second_writing(case):
    assert max(errors(case)) <= TOLERANCE


def test_mutual_learning_is_stationary_for_equal_students():
    s, y = draw(), labels()
    method, given = mutual(s.clone().requires_grad_(), s, y)
    value = method(given)
    torch.testing.assert_close(value.detach(), ce(s, y))
    assert torch.autograd.grad(value.sum(), given.student.logits)[0].abs().max() < 1e-15


def test_the_peer_is_the_methods_learned_part():
    s, y = draw(), labels()
    method, given = mutual(s, draw(seed=1), y)
    assert [name for name, _ in method.named_parameters()] == ["peer.logits"]
    step = torch.optim.SGD(method.parameters(), lr=1.0)
    before = method(given).mean()
    before.backward()
    step.step()
    assert method(given).mean() < before
    again, _ = mutual(s, draw(seed=2), y)
    again.load_state_dict(method.state_dict())
    assert torch.equal(again(given), method(given))


def test_mutual_learning_ignores_for_both_networks():
    s, y = draw(), labels()
    y[2] = IGNORE
    s[2] = math.nan
    method, given = mutual(s.requires_grad_(), draw(seed=1), y)
    value = method(given)
    value.sum().backward()
    assert value[2] == 0
    assert (s.grad[2] == 0).all()
    assert (method.peer.logits.grad[2] == 0).all()
    assert method.peer.logits.grad[1].abs().max() > 0


# ---- online label smoothing: its state, by hand

SHARP = 2 * math.log(2)  # logits (SHARP, 0, 0) are the probabilities 4/6, 1/6, 1/6
FIRST = torch.tensor([[SHARP, 0, 0], [0, 0, 0], [0, SHARP, 0], [0, 0, SHARP]], dtype=torch.float64)
TARGET = torch.tensor([0, 0, 1, 0])  # right (4/6, 1/6, 1/6); right by the tie (1/3 each); right; wrong


def online(start="uniform"):
    method = OnlineLabelSmoothing(start)
    method.build(Setup(seen(FIRST, TARGET), 4))
    return method


def test_an_epoch_of_online_smoothing_by_hand():
    method = online()
    uniform = -FIRST.log_softmax(1).mean(1)
    torch.testing.assert_close(method(seen(FIRST, TARGET)), uniform)
    torch.testing.assert_close(method(seen(FIRST, TARGET)), uniform)  # the table rests during the epoch
    third, sixth = 1 / 3, 1 / 6
    gathered = [[2, 1, 1], [2 * sixth, 8 * sixth, 2 * sixth], [0, 0, 0]]
    torch.testing.assert_close(method.gathered, torch.tensor(gathered, dtype=torch.float64))
    assert method.counted.tolist() == [4, 2, 0]
    method.end_epoch()
    table = [[0.5, 0.25, 0.25], [sixth, 4 * sixth, sixth], [third, third, third]]  # no right one of class 2
    torch.testing.assert_close(method.table, torch.tensor(table, dtype=torch.float64))
    assert method.gathered.count_nonzero() == method.counted.count_nonzero() == 0
    value, grad = value_and_grad(lambda z: method(seen(z, TARGET)), FIRST)
    torch.testing.assert_close(value, -(method.table[TARGET] * FIRST.log_softmax(1)).sum(1))
    torch.testing.assert_close(grad, FIRST.softmax(1) - method.table[TARGET])  # nothing through the table
    method.end_epoch()
    method.end_epoch()  # an epoch without any right one
    torch.testing.assert_close(method.table, torch.full((3, 3), third, dtype=torch.float64))


def test_online_smoothing_from_zero_has_no_soft_term_in_the_first_epoch():
    method = online("zero")
    value, grad = value_and_grad(lambda z: method(seen(z, TARGET)), FIRST)
    assert value.count_nonzero() == grad.count_nonzero() == 0
    assert method.counted.tolist() == [2, 1, 0]


def test_online_smoothing_gathers_only_while_training_and_only_labels_that_count():
    method = online().eval()
    method(seen(FIRST, TARGET))
    assert method.counted.tolist() == [0, 0, 0]
    method.train()
    ignoring = TARGET.clone()
    ignoring[:2] = IGNORE  # blanked to logits 0 and label 0, which is no right prediction of class 0
    assert method(seen(FIRST, ignoring))[:2].tolist() == [0, 0]
    assert method.counted.tolist() == [0, 1, 0]


def test_online_smoothing_resumes_within_an_epoch():
    method = online()
    method(seen(FIRST, TARGET))
    method.end_epoch()
    method(seen(FIRST, TARGET))
    saved = io.BytesIO()
    torch.save(method.state_dict(), saved)
    again = online()
    again.load_state_dict(torch.load(io.BytesIO(saved.getvalue())))
    for m in (method, again):
        m(seen(-FIRST, 2 - TARGET))
        m.end_epoch()
    assert torch.equal(method.table, again.table)
    assert not torch.equal(method.table, torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_online_smoothing_stays_in_float32_under_half_precision():
    method = OnlineLabelSmoothing()
    half = FIRST.half()
    method.build(Setup(seen(half, TARGET), 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = method(seen(half, TARGET))
    assert value.dtype == method.gathered.dtype == torch.float32
    torch.testing.assert_close(value.double(), -FIRST.log_softmax(1).mean(1), rtol=1e-3, atol=0)


def _two_processes(rank, folder):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    method = online()
    mine = slice(rank * 2, rank * 2 + 2)
    method(seen(FIRST[mine], TARGET[mine]))
    method.end_epoch()
    torch.save(method.table, f"{folder}/{rank}")
    dist.destroy_process_group()


def test_online_smoothing_on_two_processes_is_that_of_one(tmp_path):
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    method = online()
    method(seen(FIRST, TARGET))
    method.end_epoch()
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / str(rank)), method.table)


# ---- what all of them promise

ALL = [
    LabelSmoothing(),
    LabelSmoothing(0.1, "others"),
    GeneralizedSmoothing(-2.0),
    OnlineLabelSmoothing(),
    MaxSup(),
    ConfidencePenalty(),
    Focal(),
    Focal(0.5),
    FLSD53(),
    TfSelf(),
    TfReg(),
    TfReg(released_code=True),
    DeepMutualLearning(),
]


def ready(method, student):
    method = type(method)(*(getattr(method, field.name) for field in dataclasses.fields(method)))
    k = student.shape[-1]
    own = {"teacher": draw(len(student), k, seed=3).to(student.dtype), "images": torch.zeros(len(student), 1)}
    peer = Peer(draw(*student.shape, seed=5).to(student.dtype))
    method.build(Setup(seen(student, torch.zeros(len(student), dtype=torch.int64), **own), 10, peer))
    return method, {"teacher": draw(len(student), k, seed=3).to(student.dtype), "images": torch.zeros(len(student), 1)}


@pytest.mark.parametrize("method", ALL, ids=repr)
@pytest.mark.parametrize("k", [2, 5])
def test_gradients_and_independent_rows(method, k):
    s, y = draw(4, k), labels(4, k)
    method, more = ready(method, s)
    if isinstance(method, DeepMutualLearning):  # each side is detached from the other's term
        return
    assert torch.autograd.gradcheck(lambda z: method(seen(z, y, **more)), s.requires_grad_())
    jacobian = torch.autograd.functional.jacobian(lambda z: method(seen(z, y, **more)), s.detach())
    for i in range(4):
        assert jacobian[i, torch.arange(4) != i].count_nonzero() == 0
    # a constant added to a row changes nothing, so the gradient's rows sum to 0
    assert jacobian.sum(-1).abs().max() < 1e-12


@pytest.mark.parametrize("method", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_are_finite(method, dtype):
    s = 1e4 * torch.tensor([[1, -1, 0], [-1, 1, 1], [-1, -1, 1]], dtype=dtype)
    method, more = ready(method, s)
    more["teacher"] = -s
    for y in (torch.tensor([0, 0, 0]), torch.tensor([1, 2, 2])):
        value, grad = value_and_grad(lambda z, y=y: method(seen(z, y, **more)), s)
        assert value.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_margin_thirty_in_half_precision(method):
    s = torch.tensor([[30.0, 0.0, 0.0], [0.0, 30.0, 0.0]]).half()
    method, more = ready(method, s.float())
    y = torch.tensor([0, 0])
    with torch.autocast("cpu", dtype=torch.float16):
        value, grad = value_and_grad(lambda z: method(seen(z, y, **more)), s)
    exact, _ = value_and_grad(lambda z: method(seen(z, y, **more)), s.float())
    assert value.dtype == torch.float32
    assert grad.isfinite().all()
    torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_an_ignored_example_is_worth_nothing(method):
    s, y = draw(), labels()
    method, more = ready(method, s)
    full = method(seen(s, y, **more)).detach()
    y[1], s[1] = IGNORE, math.nan
    value, grad = value_and_grad(lambda z: method(seen(z, y, **more)), s)
    assert value[1] == 0
    assert (grad[1] == 0).all()
    rest = torch.arange(6) != 1
    torch.testing.assert_close(value[rest], full[rest])
    assert grad[rest].isfinite().all()
