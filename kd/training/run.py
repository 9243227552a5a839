"""Where a run and its teacher live, and whose a folder is: names, places, and the card that says what is in it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from kd.checkpoint import CHECKPOINTS, digest, write_json, write_text
from kd.config.schema import Recipe, content_hash, identity
from kd.errors import ConfigError
from kd.training.stored import read_card

STAGES = ("teacher", "student", "control")  # folders in a run's; a teacher's own is a study's

if TYPE_CHECKING:
    from kd.training.pipeline import Run


def run_name(recipe: Recipe) -> str:
    """The folder of a run inside its recipe's: the same command finds the same run again."""
    return f"seed{recipe.seed}-{content_hash(identity(recipe))}" if recipe.run is None else recipe.run


def teacher_is_trained(recipe: Recipe) -> bool:
    """Whether the teacher stage trains, or takes weights as they are."""
    teacher = recipe.teacher
    return teacher.finetune or not (teacher.pretrained or teacher.checkpoint is not None)


def teacher_folder(recipe: Recipe, data_hash: str) -> Path:
    """Where a trained teacher lives: named by everything that decides its weights, shared by all recipes."""
    values = identity(recipe)
    content = {key: values[key] for key in ("seed", "teacher", "data", "optimizer", "scheduler", "train")}
    del content["teacher"]["layers"]  # what a student looks at, and never sees, does not change its teacher
    del content["data"]["omit_class"]
    key = content_hash([content, data_hash, checkpoint_hash(recipe)])
    model = recipe.teacher.model.replace("/", "-").replace(":", "-")
    return Path(recipe.output) / "teachers" / f"{model}-{key}"


def check_places(recipe: Recipe) -> None:
    """Names that stay inside the output folder, and an output that is a folder where it is anything."""
    for key, part in (("name", recipe.name), ("run", run_name(recipe))):
        if not part or part.startswith(".") or Path(part).name != part or len(os.fsencode(part)) > 200:
            raise ConfigError(
                f"{key}={part!r}: must be a plain folder name (≤ 200 bytes, no /, not starting with a dot)"
            )
        if not part.isprintable():
            raise ConfigError(f"{key}={part!r}: must be a plain folder name of printable characters")
    check_output(recipe.output, write=False)
    folder = Path(recipe.output, recipe.name, run_name(recipe))
    check_own("name", folder.parent)
    check_own("run", folder, *(folder / stage / inner for stage in STAGES for inner in ("", CHECKPOINTS)))
    if recipe.name == "teachers":
        raise ConfigError("name=teachers: is the folder of trained teachers; choose another name")


def check_output(output: str, write: bool) -> None:
    """Raise ConfigError for an output that is no folder and cannot be one; to `write`, where nothing can be made."""
    wrong = f"output={output}: must be a folder that exists or can be made"
    if not output:
        raise ConfigError(wrong)
    for path in (Path(output), Path(output, "teachers")):
        try:
            nearest = next(each for each in (path, *path.parents) if _is_there(each))
            if not nearest.is_dir():
                raise ConfigError(f"{wrong} ({nearest}: is no folder)")
            if write and path == Path(output):  # only trying tells; teachers that are there may be read-only
                tempfile.TemporaryFile(dir=nearest).close()
        except OSError as error:
            raise ConfigError(f"{wrong} ({path}: {error.strerror})") from error


def _is_there(path: Path) -> bool:
    """Whether there is anything, a link to nothing too. Raises OSError where that cannot be told."""
    try:
        path.stat()
    except FileNotFoundError:
        return path.is_symlink()
    return True


def check_own(key: str, *folders: Path) -> None:
    """Raise ConfigError for a link: what is written there would land wherever a stranger points."""
    for path in folders:
        if path.is_symlink():
            raise ConfigError(f"{key}: {path} is a link; must be a folder of its own, output= may be one elsewhere")


def claim(run: Run) -> None:
    """Make the folder this run's own; refuse one that holds another run. Nothing there is ever deleted."""
    accelerator, folder = run.accelerator, run.folder
    card = {
        "identity": identity(run.recipe),
        "data_hash": run.data.hash,
        "teacher_checkpoint_hash": checkpoint_hash(run.recipe),
    }
    if accelerator.is_main_process and folder.exists() and not run.recipe.resume:
        aside = next(p for i in range(1, 10**6) if not (p := folder.with_name(f"{folder.name}.old-{i}")).exists())
        folder.rename(aside)
        run.journal.say(f"the earlier run is kept in {aside}")
    accelerator.wait_for_everyone()
    if (folder / "run.json").exists():
        _compare(read_card(folder / "run.json"), card, folder)
    elif found := [name for name in (*STAGES, "result.json") if (folder / name).exists()]:
        raise ConfigError(
            f"run={folder.name}: {folder} has {found[0]} and no run.json that says of which recipe; restore it, or "
            f"resume=false to set that run aside"
        )
    elif accelerator.is_main_process:
        write_text(folder / "recipe.yaml", OmegaConf.to_yaml(OmegaConf.structured(run.recipe)))
        write_json(folder / "run.json", card)
    accelerator.wait_for_everyone()
    if run.recipe.tracker != "none" and not (folder / "result.json").exists():
        accelerator.init_trackers(run.recipe.name)


def owner(run: Run, stage: str) -> dict[str, str]:
    """Which stage of which run files are of, as their manifests say it. A run is what run.json says; a teacher that is
    shared is what its folder's name says. Neither changes with the place of the output folder.

    Raises CheckpointError where a run's folder has no run.json as kd writes it: `claim` does.
    """
    if stage == "teacher" and run.teacher_folder.parent != run.folder:
        return {"stage": stage, "run": run.teacher_folder.name}
    return {"stage": stage, "run": content_hash(read_card(run.folder / "run.json"))}


def _compare(found: dict, card: dict, folder: Path) -> None:
    for key, setting in (("data_hash", "data.root"), ("teacher_checkpoint_hash", "teacher.checkpoint")):
        if found[key] != card[key]:
            raise ConfigError(
                f"{setting}: {folder} was trained with other content (sha256 {found[key][:12]}, now "
                f"{card[key][:12]}); restore it, or resume=false to set that run aside"
            )
    old, new = _flat(found["identity"]), _flat(card["identity"])
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"run={folder.name} holds another recipe ({key}={old.get(key)}, now {new.get(key)}; {len(changed)} "
            f"differences): choose another run=NAME, or resume=false to set that run aside"
        )


def _flat(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def checkpoint_hash(recipe: Recipe) -> str:
    """The sha256 of the teacher's own file, '' where there is none: a path may come to hold another teacher."""
    return digest(Path(recipe.teacher.checkpoint)) if recipe.teacher.checkpoint else ""
