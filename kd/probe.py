"""``python -m kd.probe model=NAME data=NAME``: how much label smoothing a classifier was trained with."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd.cli.errors import one_line_errors
from kd.config import compose
from kd.config.arguments import read
from kd.config.schema import LossConfig, Recipe
from kd.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from kd.data import Data, Split
    from kd.metrics import SmoothingEstimate
    from kd.models.factory import Teacher
    from kd.training.pipeline import Run

HELP = """usage: python -m kd.probe data=NAME model=NAME [checkpoint=PATH] [split=SPLIT] [data.KEY=VALUE ...]

Estimates the smoothing mass of the targets that a classifier was trained with, from its logits on up to 2,000 images,
with the range that the middle half of them gives, and says what speaks against the estimate.

  data=NAME        a data set of kd.train, whose classes are the classifier's; data.root=PATH and other settings of it
  model=NAME       a network of timm or kd, with timm's weights unless there is a checkpoint, which may record its model
  checkpoint=PATH  its weights
  split=SPLIT      train (the default, and what the estimate is for), val or test
  teacher.model_kwargs.KEY=VALUE   a further argument of timm.create_model

Exit code 1 when the estimate is not to be trusted, 2 when the command line cannot work.

example: python -m kd.probe data=imagenet data.root=/data/imagenet model=resnet50.tv2_in1k"""

SAMPLES = 2000
SPLITS = ("train", "val", "test")
ARGUMENTS = {"data": "NAME", "model": "NAME", "checkpoint": "FILE", "split": "SPLIT"}
ARGUMENTS |= {"data.": "VALUE", "teacher.model_kwargs.": "VALUE"}


def probe(teacher: Teacher, split: Split, batch_size: int, accelerator: Accelerator) -> SmoothingEstimate:
    """The estimate from at most SAMPLES samples of a split, not augmented, always the same ones; on every process."""
    import torch

    from kd.metrics import estimate_smoothing
    from kd.training.stage import predict

    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:SAMPLES]
    some = split.subset(chosen.sort().values)
    return estimate_smoothing(predict(teacher, some, batch_size, accelerator), some.targets)


def describe(estimate: SmoothingEstimate, num_classes: int) -> str:
    """The estimate in both conventions, and whether to trust it, on one line."""
    others = estimate.label_smoothing * (num_classes - 1) / num_classes
    doubts = f"not to be trusted: {'; '.join(estimate.doubts)}" if estimate.doubts else "nothing speaks against it"
    return f"label_smoothing {estimate} under uniform, {others:.3f} under others; {doubts}"


def tell_smoothing(run: Run, teacher: Teacher, record: tuple[float, str] | None) -> None:
    """Say how the run's teacher was smoothed, by estimate where there is no record, and where its loss does not suit.

    `record` is mass and convention; that of a teacher trained here stands in the recipe and is not repeated.
    """
    from kd.smoothing import to_uniform

    classes, say = run.data.num_classes, run.journal.say
    if record:
        mass = to_uniform(record[0], classes, record[1])
        if run.recipe.teacher.checkpoint and not run.recipe.teacher.finetune:
            say(f"teacher  its weights record label_smoothing={record[0]:g} ({record[1]})")
    else:
        estimate = probe(teacher, run.data.train, run.recipe.train.batch_size, run.accelerator)
        mass = 0.0 if estimate.doubts else estimate.label_smoothing
        say(f"teacher  its weights record no smoothing; estimate: {describe(estimate, classes)}")
    for warning in smoothing_warnings(mass, run.recipe.loss, exact=record is not None):
        say(f"warning  {warning}")


def smoothing_warnings(mass: float, loss: LossConfig, exact: bool) -> list[str]:
    """What to say of a loss whose teacher was trained with this uniform mass, known exactly or estimated."""
    if loss.kd_weight == 0:
        return []
    if loss.teacher_smoothing:
        off = exact and not math.isclose(loss.teacher_smoothing, mass, rel_tol=1e-3)
        took = f"loss.teacher_smoothing={loss.teacher_smoothing:g}: the teacher was trained with {mass:g} (uniform)"
        return [f"{took}, so this takes out what was not put in"] if off else []
    if mass == 0 or loss.temperature <= 1:
        return []
    return [
        f"loss.temperature={loss.temperature:g} > 1 with a teacher trained with label smoothing ({mass:.3g}, uniform): "
        f"such students can be worse (Chandrasegaran et al. 2022, Revisiting Label Smoothing and Knowledge "
        f"Distillation Compatibility); try loss.temperature=1, or loss.teacher_smoothing={mass:.3g}"
    ]


def run(given: dict[str, str], overrides: Sequence[str]) -> int:
    """Load, estimate, print; returns the exit code."""
    from kd.data import load_data
    from kd.models.factory import weights_metadata

    checkpoint = given.get("checkpoint")
    if checkpoint and not Path(checkpoint).is_file():
        raise ConfigError(f"checkpoint={checkpoint}: no such file; give the path of a .safetensors or .pth file")
    record = weights_metadata(checkpoint) if checkpoint else {}
    model = given.get("model") or record.get("model")
    if not model:
        raise ConfigError(
            f"model: not given{', nor recorded in checkpoint=' + checkpoint if checkpoint else ''}; type model=NAME"
        )
    if not given.get("model") and ":" in model:  # a file must not choose what is fetched, or read from where
        raise ConfigError(f"checkpoint={checkpoint}: records model={model!r}; type it, where you know what it is")
    recipe = recipe_of(given.get("data", ""), model, checkpoint, overrides)
    data = load_data(recipe.data, recipe.seed)
    estimate = estimate_for(recipe, data, given.get("split", "train"))
    known = f"{record['label_smoothing']} ({record['smoothing']})" if "label_smoothing" in record else "nothing"
    print(f"model     {model}, {checkpoint or 'timm'}")
    print(f"recorded  {known}")
    print(f"estimate  {describe(estimate, data.num_classes)}")
    return int(bool(estimate.doubts))


def estimate_for(recipe: Recipe, data: Data, split: str) -> SmoothingEstimate:
    """The estimate for the recipe's teacher as it is."""
    import torch
    from accelerate import Accelerator

    from kd.models.factory import Teacher, build

    t = recipe.teacher
    shape = {"num_classes": data.num_classes, "input_shape": data.input_shape}
    net = build(t.model, pretrained=t.pretrained, checkpoint=t.checkpoint, model_kwargs=t.model_kwargs, **shape)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    teacher = Teacher(net).to(accelerator.device)
    return probe(teacher, getattr(data, split).to(accelerator.device), recipe.train.batch_size, accelerator)


def recipe_of(data: str, model: str, checkpoint: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe of a data set with this teacher."""
    known = compose.recipe_files("data")
    if data not in known:
        near = difflib.get_close_matches(data, known, n=1)
        hint = f"did you mean data={near[0]}?" if near else "there are " + ", ".join(known)
        raise ConfigError(f"data={data}: no such data set; {hint}")
    teacher = {"model": model, "checkpoint": checkpoint, "pretrained": checkpoint is None}
    return compose.build(compose.read_recipe(known[data]), {"teacher": teacher}, words=overrides)


def main(arguments: list[str]) -> int:
    """Read the command line and estimate."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP)
        return 0
    given = read(arguments, ARGUMENTS)
    if given.get("split", "train") not in SPLITS:
        raise ConfigError(f"split={given['split']}: must be one of {', '.join(SPLITS)}")
    return run(given, [f"{key}={value}" for key, value in given.items() if "." in key])


if __name__ == "__main__":
    with one_line_errors("kd.probe"):
        sys.exit(main(sys.argv[1:]))
