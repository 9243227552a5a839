"""One network to train, and the first batch from which its objective is built."""

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from kd.config.schema import LossConfig, Recipe, TeacherConfig
from kd.data import Batch, Data, Preprocess, mixed_alike, mixer
from kd.data.mixing import Mixer
from kd.losses.methods.base import Seen, View
from kd.models.ensemble import Reclassified
from kd.models.layers import Taps
from kd.models.wrappers import Output, Student, Teacher
from kd.training.objective import Objective
from kd.training.schedule import epoch_order, mixed_seed, share

# Recorded with the weights only where it is another: all weights of an older kd were trained so.
USUAL = {"interpolation": "bilinear", "crop_pct": 0.875, "crop_mode": "center"}
FIRST_BATCH = 256  # images from which an objective is built, at most: enough for statistics


@dataclass
class Stage:
    """One network to train, whoever teaches it, with its data and its objective."""

    name: str
    model: Student
    objective: Objective
    epochs: int
    data: Data
    teacher: Teacher | None = None
    taps: tuple[Taps, Taps] | None = None  # student's and teacher's, for an objective that needs more than logits

    def networks(self) -> list[Student | Teacher]:
        """The student and, where there is one, the teacher."""
        return [self.model, self.teacher] if self.teacher else [self.model]

    def see(self, batch: Batch, epoch: float, model: nn.Module, accelerator: Accelerator) -> Seen:
        """The outputs of both networks for a batch, after `epoch` epochs; `model` is the student as it is trained."""
        images = batch.images
        shown = images if batch.teacher is None else batch.teacher
        student_taps, teacher_taps = self.taps or (None, None)
        with accelerator.autocast():
            teacher = _view(teacher_taps, self.teacher.model, self.teacher(shown)) if self.teacher else None
            student = _view(student_taps, self.model.model, model(images))
        index = batch.index.to(images.device, non_blocking=True)
        return Seen(student, teacher, batch.targets, index, epoch, self.epochs, images, len(self.data.train))


def metadata(name: str, recipe: Recipe, data: Data) -> dict[str, Any]:
    """What is saved with the weights of a stage, so that they can be used without the recipe."""
    section, labels = (recipe.teacher, recipe.teacher) if name == "teacher" else (recipe.student, recipe.loss)
    about: dict[str, Any] = {key: str(value) for key, value in smoothing_of(labels).items()}
    if name == "teacher" and recipe.teacher.methods:
        # A method that acts on the labels may smooth them too, by a mass that nobody knows.
        about = {"methods": recipe.teacher.methods}
    return about | {
        "model": section.model,
        "num_classes": str(data.num_classes),
        "class_names": data.class_names,
        "input_shape": list(data.input_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        **{name: value for name, value in _resizing(data.preprocess).items() if value != USUAL[name]},
    }


def _resizing(network: Preprocess) -> dict[str, Any]:
    """How a network's images are resized and cropped; sets held in memory know no crop."""
    names = ["interpolation"] if network.crop_mode == "whole" else list(USUAL)
    return {name: getattr(network, name) for name in names}


def smoothing_of(labels: TeacherConfig | LossConfig) -> dict[str, Any]:
    """What is recorded of a loss's label smoothing; {} where class weights give each class a smoothing of its own."""
    if labels.label_smoothing and labels.class_weight:
        return {}
    return {"label_smoothing": labels.label_smoothing, "smoothing": labels.smoothing}


def _view(taps: Taps | None, network: nn.Module, output: Output) -> View:
    return taps.view(network, output) if taps else View(output.logits)


def as_trained(batch: Batch, mix: Mixer, seed: int, channels_last: bool) -> Batch:
    """The batch mixed, and laid out in memory, as the recipe says."""
    images, targets = mix(batch.images, batch.targets, seed)
    views = [images] if batch.teacher is None else [images, mixed_alike(mix, batch.images, batch.teacher, seed)]
    if channels_last and images.ndim == 4:
        views = [view.contiguous(memory_format=torch.channels_last) for view in views]
    return Batch(batch.index, views[0], targets, *views[1:])


def build(stage: Stage, recipe: Recipe, accelerator: Accelerator, rehearse: bool = False) -> Student:
    """Move a stage to its device and build its objective; returns the network that is evaluated and saved.

    That network is the student, or what a method's own classifier makes of it. An objective with methods is built from
    the first images of the first epoch, which are the same on every process. `rehearse` also evaluates it on the
    smallest piece that a batch is split into. Raises ValueError for what cannot work, such as a network without the
    layers that a method needs.
    """
    train, processes = recipe.train, accelerator.num_processes
    for network in stage.networks():
        network.to(accelerator.device)
        if train.channels_last:
            network.to(memory_format=torch.channels_last)
    stage.objective.to(accelerator.device)
    if not stage.objective.methods:
        return stage.model
    order = epoch_order(len(stage.data.train), recipe.seed, 0)[: train.batch_size]
    smallest = share(order, train.accumulation, processes, processes - 1)[-1]
    plan = [order[:FIRST_BATCH], smallest] if rehearse else [order[:FIRST_BATCH]]
    mix = mixer(recipe.data, stage.data.num_classes)
    stage.model.eval()  # the running statistics of batch normalisation must not move
    torch.manual_seed(mixed_seed(recipe.seed, len(order)))
    with torch.no_grad():
        batches = (as_trained(b, mix, recipe.seed, train.channels_last) for b in stage.data.train.batches(plan, 0))
        seen = [stage.see(batch, 0.0, stage.model, accelerator) for batch in batches]
    stage.objective.build(*seen)
    classifier = stage.objective.classifier
    if classifier is None:
        return stage.model
    assert stage.taps is not None
    return Student(Reclassified(stage.model.model, stage.taps[0], classifier))
