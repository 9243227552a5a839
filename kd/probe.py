"""usage: python -m kd.probe data=NAME model=NAME [checkpoint=PATH] [split=SPLIT] [data.KEY=VALUE ...]

Estimates the label-smoothing mass that a classifier was trained with, from its logits on up to 2,000 images. Prints
the estimate, the range that the middle half of the images gives, and any reasons to doubt it.

  data=NAME        a data set of kd.train with the classifier's classes; data.root=PATH and other settings may follow
  model=NAME       a network of timm or kd, or FILE.py:NAME of your own; not needed if the checkpoint records it
  checkpoint=PATH  weights file; without it, timm's weights. checkpoint_key=ENTRY where several networks in it fit
  split=SPLIT      train (the default, and what the estimate is for), val or test
  teacher.model_kwargs.KEY=VALUE   a further argument of timm.create_model
  teacher.preprocess=data          images as the data set's, not as its weights were trained; teacher.image_size=N too

Exit code 1 when the estimate is not to be trusted, 2 when the command line cannot work.

example: python -m kd.probe data=imagenet data.root=/data/imagenet model=resnet50.tv2_in1k
"""

from collections.abc import Sequence

from kd.cli.errors import run_command
from kd.config import compose
from kd.config.arguments import own_files, read
from kd.config.schema import Recipe
from kd.errors import ConfigError, require
from kd.runtime.own_code import import_file

SPLITS = ("train", "val", "test")
ARGUMENTS = {"data": "NAME", "model": "NAME", "checkpoint": "FILE", "checkpoint_key": "ENTRY", "split": "SPLIT"}
ARGUMENTS |= {
    "data.": "VALUE",
    "teacher.model_kwargs.": "VALUE",
    "teacher.preprocess": "data",
    "teacher.image_size": "N",
}


def run(given: dict[str, str], words: Sequence[str]) -> int:
    """Load the classifier, estimate its smoothing and print it; returns the exit code."""
    import timm
    import torch
    from accelerate import Accelerator

    from kd.data import load_data
    from kd.models.factory import build
    from kd.models.preprocess import teacher_preprocess
    from kd.models.weights import weights_metadata
    from kd.models.wrappers import Teacher
    from kd.training.teacher_smoothing import describe, estimate_teacher_smoothing

    checkpoint = given.get("checkpoint")
    record = weights_metadata(checkpoint) if checkpoint else {}
    recipe = recipe_of(given, record.get("model"), words)
    data, own = load_data(recipe.data, recipe.seed), recipe.teacher
    unpublished = not checkpoint and timm.is_model(own.model) and not timm.models.is_model_pretrained(own.model)
    require(not unpublished, f"model={own.model}: timm has no weights for it; type checkpoint=PATH")
    data = data.rendered(teacher_preprocess(own, data.preprocess))
    shape = {"num_classes": data.num_classes, "input_shape": data.input_shape, "class_names": data.class_names}
    weights = {"pretrained": own.pretrained, "checkpoint": checkpoint, "checkpoint_key": given.get("checkpoint_key")}
    network = build(own.model, section="", model_kwargs=own.model_kwargs, **weights, **shape, say=print)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    teacher = Teacher(network).to(accelerator.device)
    split = getattr(data, given.get("split", "train")).to(accelerator.device)
    estimate = estimate_teacher_smoothing(teacher, split, recipe.train.batch_size, accelerator)
    known = f"{record['label_smoothing']} ({record['smoothing']})" if "label_smoothing" in record else "nothing"
    print(f"model     {own.model}, {checkpoint or 'timm'}")
    print(f"recorded  {known}")
    print(f"estimate  {describe(estimate, data.num_classes)}")
    return int(bool(estimate.doubts))


def recipe_of(given: dict[str, str], recorded_model: str | None, words: Sequence[str]) -> Recipe:
    """The recipe of a data set with this classifier as the teacher. Raises ConfigError."""
    data, model = given.get("data", ""), given.get("model", recorded_model)
    if not model:
        raise ConfigError("model: not given and not recorded with the weights; type model=NAME")
    if "model" not in given and ":" in model:  # a file must not choose what is fetched, or read from where
        raise ConfigError(
            f"checkpoint={given['checkpoint']}: records model={model!r}; type it as model=NAME if you trust it"
        )
    teacher = {"model": model, "checkpoint": given.get("checkpoint"), "pretrained": "checkpoint" not in given}
    values = compose.read_recipe(compose.recipe_file("data", data))
    return compose.build(values, {"teacher": teacher}, words=words)


def main(arguments: list[str]) -> int:
    """Read the command line and estimate."""
    given = read(arguments, ARGUMENTS)
    if given.get("split", "train") not in SPLITS:
        raise ConfigError(f"split={given['split']}: must be one of {', '.join(SPLITS)}")
    for path in own_files(arguments):
        import_file(path)
    return run(given, [f"{key}={value}" for key, value in given.items() if "." in key])


if __name__ == "__main__":
    run_command("kd.probe", main, __doc__)
