"""Identities of label smoothing and its alternatives, hand values, and the state of online label smoothing."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from golden_labels import ce, logits
from loss_checks import assert_same, value_and_grad
from method_batches import batch, built, labels, take

from kd.losses.methods.base import IGNORE, Seen, View
from kd.losses.methods.labels import (
    FLSD53,
    Focal,
    GeneralizedSmoothing,
    LabelSmoothing,
    MaxSup,
    OnlineLabelSmoothing,
)
from kd.losses.methods.teacher_free import TfReg
from kd.losses.methods.temperature import LogitStandardKD


def seen(student, target, **when):
    return Seen(View(student), None, target, **when)


def test_probability_targets_are_smoothed_linearly():
    s, a, b = logits(), labels(), labels(seed=1)
    mixed = 0.3 * F.one_hot(a, 5).double() + 0.7 * F.one_hot(b, 5).double()
    for method in (LabelSmoothing(0.2), LabelSmoothing(0.2, "others"), GeneralizedSmoothing(-1.5)):
        torch.testing.assert_close(
            method.evaluate(seen(s, mixed)), 0.3 * method.evaluate(seen(s, a)) + 0.7 * method.evaluate(seen(s, b))
        )


def test_focal_by_hand_and_where_the_label_is_certain():
    # p_y = 3/4 of two classes: (1/4)² log(4/3)
    s = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    assert Focal().evaluate(seen(s, torch.tensor([0]))).item() == pytest.approx(math.log(4 / 3) / 16, rel=1e-14)
    # 1 - p_y = exp(-m) up to exp(-2m), below float32's spacing at 1: value exp(-1.5 m), gradient -1.5 exp(-1.5 m)
    s = torch.tensor([[20.0, 0.0]])
    value, grad = value_and_grad(lambda z: Focal(0.5).evaluate(seen(z, torch.tensor([0]))), s)
    assert grad.isfinite().all()
    assert value.item() < 1e-10
    value, grad = value_and_grad(lambda z: Focal(0.5).evaluate(seen(z, torch.tensor([0]))), s.double())
    assert value.item() == pytest.approx(math.exp(-30), rel=1e-7)
    assert grad[0].tolist() == pytest.approx([-1.5 * math.exp(-30), 1.5 * math.exp(-30)], rel=1e-7)


@pytest.mark.parametrize(("p", "gamma"), [(0.199, 5), (0.201, 3)])
def test_flsd_chooses_gamma_by_the_probability(p, gamma):
    s = torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64)
    value, grad = value_and_grad(lambda z: FLSD53().evaluate(seen(z, torch.tensor([0]))), s)
    assert value.item() == pytest.approx(-((1 - p) ** gamma) * math.log(p), rel=1e-12)
    # d/dp of the branch's own focal loss, times dp/dz = p (1 - p): no gradient through the choice
    slope = gamma * (1 - p) ** (gamma - 1) * math.log(p) - (1 - p) ** gamma / p
    assert grad[0].tolist() == pytest.approx([slope * p * (1 - p), -slope * p * (1 - p)], rel=1e-10)


@pytest.mark.parametrize(
    ("released", "epoch", "epochs", "weight"),
    [
        (False, 5.9, 10, 0.15),  # whole epochs
        (False, 9.5, 10, 0.19),
        (True, 9.0, 10, 0.2),
        (True, 0.5, 1, 0.1),
    ],
)
def test_maxsup_by_hand(released, epoch, epochs, weight):
    s = torch.tensor([[3.0, 1.0, -1.0], [2.0, 2.0, 2.0]], dtype=torch.float64)
    method = MaxSup(released=released)
    value, grad = value_and_grad(
        lambda z: method.evaluate(seen(z, torch.tensor([2, 0]), epoch=epoch, epochs=epochs)), s
    )
    assert value.tolist() == pytest.approx([2 * weight, 0], rel=1e-12)
    assert grad[0].tolist() == pytest.approx([weight * 2 / 3, -weight / 3, -weight / 3], rel=1e-12)


def test_maxsup_is_smoothing_where_the_prediction_is_right():
    s = logits()
    y = s.argmax(1)
    assert_same(
        lambda z: ce(z, y) + MaxSup().evaluate(seen(z, y)), lambda z: LabelSmoothing(0.1).evaluate(seen(z, y)), s
    )


def test_tf_reg_at_temperature_one_is_smoothing():
    s, y = logits(), labels()
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 4))
    assert_same(
        lambda z: TfReg(0.9, 1.0).evaluate(seen(z, y)) + entropy,
        lambda z: LabelSmoothing(0.1, "others").evaluate(seen(z, y)),
        s,
    )


SHARP = 2 * math.log(2)  # logits (SHARP, 0, 0) are the probabilities 4/6, 1/6, 1/6
FIRST = torch.tensor([[SHARP, 0, 0], [0, 0, 0], [0, SHARP, 0], [0, 0, SHARP]], dtype=torch.float64)
TARGET = torch.tensor([0, 0, 1, 0])  # right (4/6, 1/6, 1/6); right by the tie (1/3 each); right; wrong


def online():
    method = OnlineLabelSmoothing()
    method.build(seen(FIRST, TARGET))
    return method


def test_an_epoch_of_online_smoothing_by_hand():
    method = online()
    uniform = -FIRST.log_softmax(1).mean(1)
    torch.testing.assert_close(method.evaluate(seen(FIRST, TARGET)), uniform)
    torch.testing.assert_close(method.evaluate(seen(FIRST, TARGET)), uniform)  # the table rests during the epoch
    third, sixth = 1 / 3, 1 / 6
    gathered = [[2, 1, 1], [2 * sixth, 8 * sixth, 2 * sixth], [0, 0, 0]]
    torch.testing.assert_close(method.gathered, torch.tensor(gathered, dtype=torch.float64))
    assert method.counted.tolist() == [4, 2, 0]
    method.end_epoch()
    table = [[0.5, 0.25, 0.25], [sixth, 4 * sixth, sixth], [third, third, third]]  # no right one of class 2
    torch.testing.assert_close(method.table, torch.tensor(table, dtype=torch.float64))
    assert method.gathered.count_nonzero() == method.counted.count_nonzero() == 0
    value, grad = value_and_grad(lambda z: method.evaluate(seen(z, TARGET)), FIRST)
    torch.testing.assert_close(value, -(method.table[TARGET] * FIRST.log_softmax(1)).sum(1))
    torch.testing.assert_close(grad, FIRST.softmax(1) - method.table[TARGET])  # nothing through the table
    method.end_epoch()
    method.end_epoch()  # an epoch without any right one
    torch.testing.assert_close(method.table, torch.full((3, 3), third, dtype=torch.float64))


def test_online_smoothing_gathers_only_while_training_and_only_labels_that_count():
    method = online().eval()
    method.evaluate(seen(FIRST, TARGET))
    assert method.counted.tolist() == [0, 0, 0]
    method.train()
    ignoring = TARGET.clone()
    ignoring[:2] = IGNORE  # blanked to logits 0 and label 0, which is no right prediction of class 0
    assert method.evaluate(seen(FIRST, ignoring))[:2].tolist() == [0, 0]
    assert method.counted.tolist() == [0, 1, 0]


def test_standardized_online_smoothing_takes_its_table_at_an_epochs_end():
    method = LogitStandardKD("online_label_smoothing")
    method(FIRST, TARGET)
    method.end_epoch()
    assert not torch.equal(method.inner.table, torch.full((3, 3), 1 / 3, dtype=torch.float64))


def _two_processes(rank, directory):
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=2)
    mine = slice(0, 3) if rank == 0 else slice(3, None)  # uneven shares
    method = online()
    method.evaluate(seen(FIRST[mine], TARGET[mine]))
    method.end_epoch()
    whole = batch(5, 3)
    crd = built("crd", whole, num_negatives=6, embed_dim=8, released=True)
    crd.evaluate(take(whole, mine))
    torch.save((method.table, crd.state_dict()), f"{directory}/{rank}")
    dist.destroy_process_group()


def test_on_two_processes_online_smoothing_gathers_as_on_one_and_crd_remembers_the_same(tmp_path):
    torch.multiprocessing.spawn(_two_processes, (str(tmp_path),), nprocs=2)
    method, whole = online(), batch(5, 3)
    method.evaluate(seen(FIRST, TARGET))
    method.end_epoch()
    (first, crd), (second, other) = (torch.load(tmp_path / str(rank)) for rank in (0, 1))
    torch.testing.assert_close(first, method.table)
    torch.testing.assert_close(second, method.table)
    assert all(torch.equal(crd[key], other[key]) for key in crd)
    alone = built("crd", whole, num_negatives=6, embed_dim=8, released=True)
    alone.evaluate(whole)
    for key in ("memory_student", "memory_teacher", "labels"):  # constants depend on what each process drew
        torch.testing.assert_close(crd[key], alone.state_dict()[key])
