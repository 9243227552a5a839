"""The exactly smoothed teacher: what it is, that unsmoothing undoes it, and both through a whole training."""

import math
from dataclasses import replace

import pytest
import torch
from populations import EPOCHS, HARD, RECIPE, network, with_optimizer

from kd.config.schema import LossConfig
from kd.data import load_data
from kd.losses.methods.base import Seen, View
from kd.losses.methods.logits import KD
from kd.losses.methods.smoothed_teacher import SmoothedTeacher
from kd.study.population import Member, Training

KD_4 = LossConfig(temperature=4.0, kd_weight=1.0, ce_weight=0.0)


@pytest.fixture
def seen():
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 50, 7, dtype=torch.float64, generator=generator)
    return Seen(View(student), View(teacher), torch.arange(50) % 7)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_its_value_by_probabilities(seen, temperature):
    q = 0.7 * seen.teacher.logits.softmax(-1) + 0.3 / 7
    q = q ** (1 / temperature) / (q ** (1 / temperature)).sum(-1, keepdim=True)
    p = (seen.student.logits / temperature).softmax(-1)
    expected = temperature**2 * (q * (q / p).log()).sum(-1)
    found = SmoothedTeacher(mass=0.3, temperature=temperature)(seen)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_at_temperature_one_it_is_kd_and_a_smoothing_of_the_student(seen):
    """H((1-eps) p + eps u, s) = (1-eps) H(p, s) + eps H(u, s): gradients are equal, so nothing is erased."""

    def gradient(value):
        leaf = seen.student.logits.clone().requires_grad_()
        return torch.autograd.grad(value(replace(seen, student=View(leaf))).sum(), leaf)[0]  # fmt: skip

    def both(seen):
        towards_uniform = -seen.student.logits.log_softmax(-1).mean(-1)
        return 0.6 * KD(temperature=1.0)(seen) + 0.4 * towards_uniform

    one = SmoothedTeacher(mass=0.4, temperature=1.0)
    torch.testing.assert_close(gradient(one), gradient(both), atol=1e-12, rtol=0)
    other = SmoothedTeacher(mass=0.4, temperature=4.0)
    assert (gradient(other) - gradient(KD(temperature=4.0))).abs().max() > 0.1


def test_what_is_taken_out_again_leaves_plain_kd_also_in_float32(seen):
    found = SmoothedTeacher(mass=0.4, taken_out=0.4, temperature=4.0)(seen)
    torch.testing.assert_close(found, KD(temperature=4.0)(seen), atol=1e-9, rtol=0)
    sure = Seen(View(seen.student.logits.float()), View(seen.teacher.logits.float()), seen.target)
    found = SmoothedTeacher(mass=0.4, taken_out=0.4, temperature=4.0)(sure)
    torch.testing.assert_close(found, KD(temperature=4.0)(sure), atol=1e-4, rtol=0)


def test_unsmoothing_recovers_the_clean_teachers_student_through_a_whole_training():
    """End to end in float64: by `loss.teacher_smoothing` and by the method, against students that lost something."""
    data, eps = load_data(RECIPE.data, RECIPE.seed), 0.4
    teacher = network("mlp_tiny").double()
    with torch.no_grad():
        teacher.fc.weight.mul_(3)  # p of 1e-12 beside eps/K would keep four digits only

    def source(images, index):
        clean = teacher(images).log_softmax(-1)
        return torch.stack([clean, torch.logaddexp(clean + math.log1p(-eps), torch.tensor(math.log(eps / 10)))])

    method = {"smoothed_teacher": {"mass": eps, "taken_out": eps, "temperature": 4.0}}
    members = [
        Member(KD_4, 0),
        Member(replace(KD_4, teacher_smoothing=eps), 1),
        Member(replace(HARD, ce_weight=0.0, methods=method), 0),
        Member(KD_4, 1),
    ]
    # AdamW divides a gradient by its size: where one is but rounding, it would take a step of that.
    recipe = with_optimizer(name="sgd", lr=0.05)
    population = Training(recipe, data, EPOCHS, network("mlp_nano"), members, source, torch.float64).fit()
    clean, unsmoothed, by_method, smoothed = (population.member(i) for i in range(4))
    for name, p in clean.items():
        torch.testing.assert_close(unsmoothed[name], p, atol=1e-8, rtol=0)
        torch.testing.assert_close(by_method[name], p, atol=1e-8, rtol=0)
    assert max((smoothed[name] - p).abs().max() for name, p in clean.items()) > 1e-3


@pytest.mark.parametrize("setting", [{"mass": 1.0}, {"taken_out": -0.1}, {"temperature": 0.0}])
def test_what_cannot_be_is_said(setting):
    with pytest.raises(ValueError, match=rf"smoothed_teacher.{next(iter(setting))}"):
        SmoothedTeacher(**setting)
