"""Run and teacher directories, and run.json, which identifies their recipe."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from omegaconf import OmegaConf

from kd.checkpoint.files import advised, read_json, write_json, write_text
from kd.checkpoint.manifest import DONE
from kd.checkpoint.store import CHECKPOINTS, advice, finished, remove
from kd.config.schema import Recipe, content_hash, identity
from kd.config.types import leaves
from kd.data import Data
from kd.errors import require
from kd.models.preprocess import own_preprocess, teacher_preprocess
from kd.models.weights import checkpoint_hash, weight_files
from kd.runtime.lock import locked
from kd.runtime.signals import check
from kd.text import plain
from kd.training.logger import Logger

STAGES = ("teacher", "student", "control")  # directories of a run; only a study keeps its teachers there too
WEIGHTS = ("last", "selected")  # that a finished stage leaves


@dataclass(frozen=True)
class Run:
    """What every stage of a run shares."""

    recipe: Recipe
    data: Data
    accelerator: Accelerator
    directory: Path
    teacher_directory: Path
    logger: Logger

    @cached_property
    def teacher_data(self) -> Data:
        """The data as the teacher takes them. Raises ConfigError and CheckpointError."""
        return self.data.rendered(teacher_preprocess(self.recipe.teacher, self.data.preprocess))

    def owner(self, stage: str) -> dict[str, str]:
        """The stage and run that a manifest names as the owner of its files.

        A run is identified by run.json, which `claim` writes, and a shared teacher by the name of its directory. So
        neither changes when the output directory moves. Raises CheckpointError for a damaged run.json.
        """
        if stage == "teacher" and self.teacher_directory.parent != self.directory:
            return {"stage": stage, "run": self.teacher_directory.name}
        path = self.directory / "run.json"
        # An older kd may have written fewer settings: the file, not today's recipe, is what the manifests were made of.
        return {"stage": stage, "run": content_hash(read_card(path) if path.exists() else card(self))}

    def stage_directory(self, stage: str) -> Path:
        """Where a stage's checkpoints, weights and stage.json are."""
        return self.teacher_directory if stage == "teacher" else self.directory / stage

    def is_finished(self, stage: str) -> bool:
        """Whether a stage has its weights; `check_finished` sees whether they are whole."""
        return (self.stage_directory(stage) / DONE).exists()

    def weights(self, stage: str, which: str = "last") -> Path | None:
        """The weight file of a stage; None for a teacher that is used with the weights it has."""
        own = stage == "teacher" and not teacher_is_trained(self.recipe)
        return None if own else self.stage_directory(stage) / f"{which}.safetensors"


def run_name(recipe: Recipe) -> str:
    """The name of a run's directory: the same command finds the same run again."""
    return f"seed{recipe.seed}-{content_hash(identity(recipe))}" if recipe.run is None else recipe.run


def run_directory(recipe: Recipe) -> Path:
    """``output/name/run``."""
    return Path(recipe.output, recipe.name, run_name(recipe))


def teacher_is_trained(recipe: Recipe) -> bool:
    """Whether the teacher is trained or finetuned here, instead of taken with the weights that it has."""
    teacher = recipe.teacher
    return teacher.finetune or not (teacher.pretrained or teacher.checkpoint is not None)


def teacher_directory(recipe: Recipe, data_hash: str, preprocess: Mapping[str, Any] | None = None) -> Path:
    """Where a trained teacher lives: named after everything that decides its weights, and shared by all recipes.

    `preprocess` is that of a teacher whose images are not the student's.
    """
    values = identity(recipe)
    content = {key: values[key] for key in ("seed", "teacher", "data", "optimizer", "scheduler", "train")}
    # Neither changes the teacher: these layers are what its student looks at, and only the student omits the class.
    del content["teacher"]["layers"]
    del content["data"]["omit_class"]
    for name in ("preprocess", "image_size"):  # what they come to counts
        content["teacher"].pop(name, None)
    more = filter(None, [weight_files(recipe.teacher), preprocess])
    key = content_hash([content, data_hash, checkpoint_hash(recipe), *more])
    model = recipe.teacher.model.replace("/", "-").replace(":", "-")
    return Path(recipe.output) / "teachers" / f"{model}-{key}"


def shared_teacher_directory(run: Run) -> Path:
    """The `teacher_directory` of a run."""
    return teacher_directory(run.recipe, run.data.hash, own_preprocess(run.recipe.teacher, run.data.preprocess))


def card(run: Run) -> dict[str, Any]:
    """The content of run.json: what decides every weight of the run."""
    files = weight_files(run.recipe.teacher, run.recipe.student)
    preprocess = own_preprocess(run.recipe.teacher, run.data.preprocess)
    settings = identity(run.recipe)
    settings["teacher"].pop("preprocess", None)  # what it comes to counts: an older kd's runs have no such setting
    return {
        "identity": settings,
        "data_hash": run.data.hash,
        "teacher_checkpoint_hash": checkpoint_hash(run.recipe),
        **({"weight_files": files} if files else {}),
        **({"teacher_preprocess": preprocess} if preprocess else {}),
    }


def read_card(path: Path) -> dict[str, Any]:
    """A run.json. Raises CheckpointError where it is missing, damaged or something else."""
    with advised("restore it, or resume=false to set that run aside"):
        return read_json(path, ("identity", "data_hash", "teacher_checkpoint_hash"))


def claim(run: Run) -> None:
    """Write run.json into the run directory, or check that it is this run's. Nothing is ever deleted there.

    With resume=false an earlier run is renamed. Raises ConfigError for the directory of another run.
    """
    accelerator, directory = run.accelerator, run.directory
    own = card(run)
    if accelerator.is_main_process and directory.exists() and not run.recipe.resume:
        numbered = (directory.with_name(f"{directory.name}.old-{i}") for i in range(1, 10**6))
        aside = next(path for path in numbered if not path.exists())
        directory.rename(aside)
        run.logger.say(f"the earlier run is kept in {aside}")
    accelerator.wait_for_everyone()
    if (directory / "run.json").exists():
        cards = (read_card(directory / "run.json"), own)
        changed = changes(*({**each, **each["identity"], "identity": None} for each in cards))
        others = f"{'; '.join(changed[:1])}; {len(changed)} differences"
        advice = "choose another run=NAME, or resume=false to set that run aside"
        require(not changed, f"run={directory.name} holds another recipe ({others}): {advice}")
    elif accelerator.is_main_process:
        write_text(directory / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.structured(run.recipe)))
        write_json(directory / "run.json", own)
    accelerator.wait_for_everyone()
    if run.recipe.tracker != "none" and not (directory / "result.json").exists():
        accelerator.init_trackers(run.recipe.name)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two records, a line for each value. One that an older kd did not write counts as null."""
    old, new = dict(leaves(before)), dict(leaves(now))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    return [f"{key}: {plain(str(old.get(key)), 80)}, now {plain(str(new.get(key)), 80)}" for key in changed]


def check_finished(run: Run, stage: str) -> None:
    """Raise CheckpointError unless all files of a trained stage are whole and its own; remove checkpoints that a kill
    left there.
    """
    directory = run.stage_directory(stage)
    for which in WEIGHTS:  # both are scored when everything is trained, which may be days later
        finished(directory / f"{which}.safetensors", advice(stage, directory), run.owner(stage))
    if run.accelerator.is_main_process:
        remove(directory / CHECKPOINTS)


def alone_on_teacher(run: Run) -> AbstractContextManager[bool]:
    """Wait while another run trains the same teacher, which all runs share; gives whether it is finished."""
    say_once = cache(run.logger.say)

    def busy(holder: str) -> None:
        say_once(f"teacher  waits for {holder}, which trains it in {run.teacher_directory}")
        check(run.accelerator)
        time.sleep(0.5)

    return locked(run.teacher_directory, busy, lambda: run.is_finished("teacher"), run.accelerator)
