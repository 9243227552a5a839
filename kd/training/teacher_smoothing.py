"""The label smoothing of a teacher: recorded with its weights, or estimated from its logits."""

import math

import torch
from accelerate import Accelerator

from kd.config.schema import LossConfig, Recipe
from kd.data import Split
from kd.metrics import SmoothingEstimate, estimate_smoothing
from kd.models.weights import weights_metadata
from kd.models.wrappers import Teacher
from kd.smoothing import to_uniform
from kd.training.predict import predict
from kd.training.run import Run, teacher_is_trained
from kd.training.stage import smoothing_of

SAMPLES = 2000  # of the training set: enough for a stable median, and seconds for any network


def recorded_smoothing(recipe: Recipe) -> tuple[float, str] | None:
    """Smoothing mass and convention that the teacher is or was trained with; None where they are not recorded."""
    if teacher_is_trained(recipe):
        # A method that acts on the labels may smooth them too, by a mass that nobody knows.
        record = {} if recipe.teacher.methods else smoothing_of(recipe.teacher)
    else:
        record = weights_metadata(recipe.teacher.checkpoint) if recipe.teacher.checkpoint else {}
    return (float(record["label_smoothing"]), record["smoothing"]) if "label_smoothing" in record else None


def estimate_teacher_smoothing(
    teacher: Teacher, split: Split, batch_size: int, accelerator: Accelerator
) -> SmoothingEstimate:
    """The estimate from at most SAMPLES samples of a split, without augmentation; the same ones on every call."""
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    samples = split.subset(chosen.sort().values)
    return estimate_smoothing(predict(teacher, samples, batch_size, accelerator), samples.targets)


def describe(estimate: SmoothingEstimate, num_classes: int) -> str:
    """The estimate in both conventions, and whether to trust it, on one line."""
    others = estimate.label_smoothing * (num_classes - 1) / num_classes
    doubts = f"not to be trusted: {'; '.join(estimate.doubts)}" if estimate.doubts else "nothing speaks against it"
    return f"label_smoothing {estimate} under uniform, {others:.3f} under others; {doubts}"


def report_smoothing(run: Run, teacher: Teacher) -> None:
    """Print how the run's teacher was smoothed, estimated where it is not recorded, and warn of a loss that is known
    to suffer from it. The smoothing of a teacher that is trained here stands in the recipe and is not repeated.
    """
    classes, say = run.data.num_classes, run.logger.say
    record = recorded_smoothing(run.recipe)
    if record:
        mass = to_uniform(record[0], classes, record[1])
        if not teacher_is_trained(run.recipe):
            say(f"teacher  its weights record label_smoothing={record[0]:g} ({record[1]})")
    else:
        estimate = estimate_teacher_smoothing(
            teacher, run.teacher_data.train, run.recipe.train.batch_size, run.accelerator
        )
        mass = 0.0 if estimate.doubts else estimate.label_smoothing
        say(f"teacher  its weights record no smoothing; estimate: {describe(estimate, classes)}")
    if warning := smoothing_warning(mass, run.recipe.loss, exact=record is not None):
        say(f"warning  {warning}")


def smoothing_warning(mass: float, loss: LossConfig, exact: bool) -> str:
    """A warning about a loss whose teacher was trained with this uniform mass, known exactly or estimated, or ''."""
    if loss.kd_weight == 0:
        return ""
    if loss.teacher_smoothing and exact and not math.isclose(loss.teacher_smoothing, mass, rel_tol=1e-3):
        setting = f"loss.teacher_smoothing={loss.teacher_smoothing:g}"
        return f"{setting}: the teacher was trained with {mass:.3g} (uniform), so this removes what is not there"
    if loss.teacher_smoothing or mass == 0 or loss.temperature <= 1:
        return ""
    return (
        f"loss.temperature={loss.temperature:g} > 1 with a teacher trained with label smoothing ({mass:.3g}, uniform): "
        f"such students can be worse (Chandrasegaran et al. 2022, Revisiting Label Smoothing and Knowledge "
        f"Distillation Compatibility); try loss.temperature=1, or loss.teacher_smoothing={mass:.3g}"
    )
