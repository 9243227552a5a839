"""``python -m kd.probe model=NAME data=NAME``: how much label smoothing a classifier was trained with."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd.cli.errors import one_line_errors
from kd.config import compose
from kd.config.arguments import read
from kd.config.schema import Recipe
from kd.errors import ConfigError

if TYPE_CHECKING:
    from kd.data import Data
    from kd.metrics import SmoothingEstimate

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

SPLITS = ("train", "val", "test")
ARGUMENTS = {"data": "NAME", "model": "NAME", "checkpoint": "FILE", "split": "SPLIT"}
ARGUMENTS |= {"data.": "VALUE", "teacher.model_kwargs.": "VALUE"}


def run(given: dict[str, str], overrides: Sequence[str]) -> int:
    """Load, estimate, print; returns the exit code."""
    from kd.data import load_data
    from kd.models.weights import weights_metadata
    from kd.training.teacher_smoothing import describe

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

    from kd.models.factory import build
    from kd.models.wrappers import Teacher
    from kd.training.teacher_smoothing import estimate_teacher_smoothing

    t = recipe.teacher
    shape = {"num_classes": data.num_classes, "input_shape": data.input_shape}
    net = build(t.model, pretrained=t.pretrained, checkpoint=t.checkpoint, model_kwargs=t.model_kwargs, **shape)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    teacher = Teacher(net).to(accelerator.device)
    samples = getattr(data, split).to(accelerator.device)
    return estimate_teacher_smoothing(teacher, samples, recipe.train.batch_size, accelerator)


def recipe_of(data: str, model: str, checkpoint: str | None, overrides: Sequence[str]) -> Recipe:
    """The recipe of a data set with this teacher."""
    teacher = {"model": model, "checkpoint": checkpoint, "pretrained": checkpoint is None}
    values = compose.read_recipe(compose.recipe_file("data", data))
    return compose.build(values, {"teacher": teacher}, words=overrides)


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
