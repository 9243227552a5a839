"""What came out: the scores of teacher, student and control, the paired difference, result.json and its table."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from kd.checkpoint import advice, finished, write_json
from kd.config.schema import content_hash, identity
from kd.metrics import agreement, classification, predictive_kl
from kd.models.factory import Teacher
from kd.runtime.provenance import provenance
from kd.text import plain
from kd.training.pipeline import evaluated_student, student_network, teacher_network
from kd.training.predict import predict
from kd.training.run import Run, checkpoint_hash, teacher_is_trained
from kd.training.stored import read_result
from kd.training.teacher_smoothing import recorded_smoothing

NETWORKS = ("teacher", "student", "control")
WEIGHTS = ("last", "selected")
SPLITS = ("val", "test")


def weights_of(run: Run, name: str, which: str) -> Path | None:
    """The file of a network's weights; None for a teacher that was taken as it is."""
    if name != "teacher":
        return run.directory / name / f"{which}.safetensors"
    return run.teacher_directory / f"{which}.safetensors" if teacher_is_trained(run.recipe) else None


def verified(run: Run, advise: Callable[[str, Path], str] = advice) -> dict[str, str]:
    """The sha256 of every network's last weights that were trained, once all files are seen to be the run's own.

    Raises CheckpointError, ending in what `advise` says of a network and its folder.
    """
    found = {}
    for name in NETWORKS if run.recipe.control else NETWORKS[:2]:
        for path in filter(None, (weights_of(run, name, which) for which in reversed(WEIGHTS))):
            stage = finished(path, advise(name, path.parent), run.owner(name))
            found[name] = stage["files"][path.name]["sha256"]
    return found


def networks(run: Run) -> dict[str, dict[str, Teacher]]:
    """Every network of the run, frozen, by name and weights; a teacher taken as it is has one set of weights."""
    verified(run)
    names = NETWORKS if run.recipe.control else NETWORKS[:2]
    found: dict[str, dict[str, Teacher]] = {}
    for name in names:
        teacher = found["teacher"]["last"] if found else None
        paths = {which: weights_of(run, name, which) for which in WEIGHTS}
        built = {path: Teacher(evaluated_network(run, name, path, teacher)) for path in set(paths.values())}
        for model in built.values():
            model.to(run.accelerator.device)
        found[name] = {which: built[path] for which, path in paths.items()}
    return found


def evaluated_network(run: Run, name: str, weights: Path | None, teacher: Teacher | None) -> nn.Module:
    """A network as it is evaluated, by the name of its stage; the student may need the teacher."""
    if name == "teacher":
        return teacher_network(run, weights)
    if name == "control":
        return student_network(run, weights)
    assert weights is not None
    assert teacher is not None
    return evaluated_student(run, weights, teacher)


def score(run: Run, models: dict[str, dict[str, Teacher]]) -> dict[str, Any]:
    """Every network on validation and test, from the weights on disk. The test split is read here only."""
    splits = {"val": run.data.val, "test": run.data.test}
    logits = {
        name: {
            w: {s: predict(model, splits[s], run.recipe.train.batch_size, run.accelerator) for s in SPLITS}
            for w, model in by_weights.items()
        }
        for name, by_weights in models.items()
    }
    targets = {s: split.targets for s, split in splits.items()}
    scores: dict[str, Any] = {
        name: {w: {s: classification(logits[name][w][s], targets[s]) for s in SPLITS} for w in WEIGHTS}
        for name in models
    }
    for w in WEIGHTS:
        for s in SPLITS:
            taught_by = logits["teacher"]["last"][s]
            scores["student"][w][s]["agreement"] = agreement(logits["student"][w][s], taught_by).item()
            scores["student"][w][s]["kl_to_teacher"] = predictive_kl(taught_by, logits["student"][w][s]).item()
    if "control" in models:
        scores["difference"] = {
            w: {s: paired_difference(logits["student"][w][s], logits["control"][w][s], targets[s]) for s in SPLITS}
            for w in WEIGHTS
        }
    return scores


def paired_difference(a: Tensor, b: Tensor, targets: Tensor) -> dict[str, float]:
    """Top-1 of `a` minus top-1 of `b` on the same images, with its paired standard error.

    d_i = 1{a right on i} - 1{b right on i};  top1 = mean d;  standard_error = sd(d) / sqrt(n).
    The error covers the choice of images only, not that of the seed.
    """
    d = (a.argmax(-1) == targets).double() - (b.argmax(-1) == targets).double()
    n = len(d)
    return {"top1": float(d.mean()), "standard_error": float(d.std()) / math.sqrt(n) if n > 1 else 0.0, "n": n}


def write_result(run: Run) -> dict[str, Any]:
    """Score the run and write result.json, on the main process; every process takes part in the scoring."""
    models = networks(run)
    result: dict[str, Any] = {"recipe": run.recipe.name, **score(run, models)}
    for name, by_weights in models.items():
        result[name] |= _card(run, name, by_weights["last"])
    result["provenance"] = provenance(run.accelerator.num_processes) | {
        "recipe_hash": content_hash(identity(run.recipe)),
        "data_hash": run.data.hash,
        "teacher_file": checkpoint_hash(run.recipe),
        "seed": run.recipe.seed,
        "seconds": sum(result[name]["seconds"] for name in models),
    }
    if run.accelerator.is_main_process:
        write_json(run.directory / "result.json", result)
    run.accelerator.wait_for_everyone()  # others may read it next
    return result


def _card(run: Run, name: str, model: Teacher) -> dict[str, Any]:
    """What a network is, where its weights came from and what they cost."""
    recipe = run.recipe
    section = recipe.teacher if name == "teacher" else recipe.student
    card = {"model": section.model, "parameters": sum(p.numel() for p in model.model.parameters())}
    path = weights_of(run, name, "last")
    if path is None:
        record = recorded_smoothing(recipe)
        smoothing = {"label_smoothing": record[0], "smoothing": record[1]} if record else {}
        return card | {"weights": recipe.teacher.checkpoint or "timm", "seconds": 0.0, **smoothing}
    stage = finished(path)
    smoothing = recipe.teacher if name == "teacher" else recipe.loss
    return card | {
        "weights": str(path),
        "sha256": stage["files"][path.name]["sha256"],  # those that `networks` saw
        "seconds": stage["seconds"],
        "selected_epoch": stage["selected"]["epoch"],
        "skipped_updates": stage.get("skipped", 0),  # by fp16's scaler
        "label_smoothing": smoothing.label_smoothing,
        "smoothing": smoothing.smoothing,
    }


def verdict(result: dict[str, Any]) -> str:
    """Whether distillation helped, and the difference that says so; twice its standard error is called chance."""
    if "difference" not in result:
        return "no control was trained (control=false): nothing says whether distillation helped"
    d = result["difference"]["last"]["test"]
    top1, error = 100 * d["top1"], 100 * d["standard_error"]
    word = "helped" if top1 > 2 * error else "hurt" if top1 < -2 * error else "made no difference beyond chance"
    return (
        f"student − control: {top1:+.2f} ± {error:.2f} points of test top-1 "
        f"(paired standard error, {d['n']} images, one seed)\ndistillation {word}"
    )


def print_stored(path: Path, console: Console) -> None:
    """The table of a result.json. Raises CheckpointError."""
    print_result(read_result(path), console)


def print_result(result: dict[str, Any], console: Console) -> None:
    """The table of a result, in per cent where a figure is a share, and the verdict."""
    pair = escape(" teaches ".join(plain(result[name]["model"], 200) for name in NETWORKS[:2]))
    table = Table(title=f"{pair}: last weights on the test split", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("val", "top-1", "selected", "nll", "ece", "brier", "agree"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in (name for name in NETWORKS if name in result):
        row, test = result[name], result[name]["last"]["test"]
        shares = (row["last"]["val"]["top1"], test["top1"], row["selected"]["test"]["top1"])
        rest = (f"{test['nll']:.4f}", f"{test['ece']:.4f}", f"{test['brier']:.4f}")
        agree = f"{test['agreement']:.2%}" if "agreement" in test else ""
        table.add_row(name, *(f"{share:.2%}" for share in shares), *rest, agree)
    console.print(table)
    console.print(verdict(result), highlight=False, markup=False)
