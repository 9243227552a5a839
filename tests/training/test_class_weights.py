"""Class weights of a recipe: an update is that of nn.CrossEntropyLoss, however its batch is split."""

import copy
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from kd.config.schema import DataConfig, LossConfig, Recipe, TeacherConfig
from kd.losses.distill import DistillLoss
from kd.models.wrappers import Teacher
from kd.training import pipeline
from kd.training.schedule import mixed_seed
from kd.training.stage import metadata
from kd.training.teacher_smoothing import recorded_smoothing
from tests.training.tiny_loop import Tiny, recipe, trainer

WEIGHT = torch.arange(10.0).double()


@pytest.mark.parametrize(("accumulation", "mixup"), [(1, 0), (4, 0), (1, 0.5)])
def test_an_update_has_the_gradient_of_torch_on_the_whole_batch(accumulation, mixup, tmp_path):
    """The second one, since each divides by the weights of its own labels. Mixed labels are divided by their number."""
    loss = DistillLoss(kd_weight=0, ce_weight=1, label_smoothing=0.1, class_weight=WEIGHT.clone(), reduction="sum")
    r = recipe(accumulation=accumulation)
    r.data.mixup = mixup
    t = trainer(tmp_path, r, loss=loss)
    network = t.stage.model.model.double()
    batches = (batch._replace(images=batch.images.double()) for batch in t._batches(0, 0))
    t._update(list(islice(batches, accumulation)))
    t.progress.update = 1
    whole, pieces = copy.deepcopy(network), list(islice(batches, accumulation))
    gradients = []
    t.optimizer.register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in network.parameters()))
    logged = t._update(pieces)
    images, labels = (torch.cat([getattr(piece, name) for piece in pieces]) for name in ("images", "targets"))
    if mixup:
        images, labels = t.mix(images, labels, mixed_seed(r.seed, 1, 0, 0))
        labels = labels.double()
    expected = nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1)(whole(images), labels)
    expected.backward()
    assert logged["loss"].item() / len(labels) == pytest.approx(expected.item(), rel=1e-12)
    for ours, p in zip(gradients, whole.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=0, atol=1e-12)


def test_a_batch_whose_labels_all_have_weight_0_moves_nothing(tmp_path):
    loss = DistillLoss(kd_weight=0, ce_weight=1, class_weight=torch.zeros(10), reduction="sum")
    logged = (t := trainer(tmp_path, recipe(), loss=loss))._update([next(t._batches(0, 0))])
    assert (logged["loss"].item(), logged["grad_norm"].item()) == (0, 0)


def test_balanced_weights_follow_the_labels_of_each_network(tmp_path):
    counted = pipeline.class_weights("balanced", torch.tensor([0, 0, 0, 2]), 3)
    torch.testing.assert_close(counted, torch.tensor([4 / 9, 0, 4 / 3]))
    balanced = {"class_weight": "balanced"}
    r = replace(
        recipe(), data=DataConfig(image_size=8, omit_class=7), output=str(tmp_path), loss=LossConfig(**balanced)
    )
    r.teacher, r.student.model = TeacherConfig(model="mlp_nano", **balanced), "mlp_nano"
    run = pipeline.prepare(r)
    labels = run.data.train.targets.numpy()
    of_teacher = compute_class_weight("balanced", classes=np.arange(10), y=labels)
    of_student = compute_class_weight("balanced", classes=np.delete(np.arange(10), 7), y=labels[labels != 7]) * 9 / 10
    stages = pipeline.teacher_stage(run), pipeline.control_stage(run), pipeline.student_stage(run, Teacher(Tiny()))
    for stage, expected in zip(stages, (of_teacher, *2 * [np.insert(of_student, 7, 0)]), strict=True):
        np.testing.assert_allclose(stage.objective.class_weight, expected, rtol=1e-6)
    assert metadata("teacher", r, run.data)["label_smoothing"] == "0.0"
    r.teacher.label_smoothing = r.loss.label_smoothing = 0.1
    assert not {"label_smoothing", "smoothing"} & metadata("teacher", r, run.data).keys()
    assert not {"label_smoothing", "smoothing"} & metadata("student", r, run.data).keys()


@pytest.mark.parametrize(
    ("mass", "weights", "recorded"), [(0.1, "balanced", None), (0, "balanced", 0), (0.1, None, 0.1)]
)
def test_class_weights_leave_no_uniform_smoothing_to_record(mass, weights, recorded):
    known = recorded_smoothing(Recipe(teacher=TeacherConfig(label_smoothing=mass, class_weight=weights)))
    assert known == (None if recorded is None else (recorded, "uniform"))
