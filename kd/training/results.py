"""The result of a run: scores, the paired difference, and where everything came from; its table and its verdict."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from kd.checkpoint.files import advised, read_json, write_json
from kd.checkpoint.store import finished
from kd.config.schema import content_hash, identity
from kd.config.types import leaves
from kd.metrics import compute, reliability_bins
from kd.models.classes import recorded, reordered
from kd.models.weights import checkpoint_hash, weight_files
from kd.models.wrappers import Teacher
from kd.runtime.provenance import provenance
from kd.text import plain
from kd.training.pipeline import evaluated_network
from kd.training.predict import predict
from kd.training.preflight import chance
from kd.training.run import STAGES, WEIGHTS, Run, check_finished
from kd.training.stage import smoothing_of
from kd.training.teacher_smoothing import recorded_smoothing

# Below these a difference says nothing of distillation: its standard error is none of a normal distribution, or the
# networks have hardly begun to learn, as those of recipe=smoke.
FEWEST_IMAGES, FEWEST_UPDATES = 30, 50
Networks = dict[str, dict[str, Teacher]]  # by stage and weights


# ---- networks of a finished run


def load_networks(run: Run) -> Networks:
    """Every network of a finished run, frozen, by stage and weights. Raises CheckpointError for damaged files."""
    networks: Networks = {}
    for name in STAGES if run.recipe.control else STAGES[:2]:
        if run.weights(name):
            check_finished(run, name)
        teacher, networks[name] = networks.get("teacher", {}).get("last"), {}
        for which in WEIGHTS:
            path = run.weights(name, which)
            network = evaluated_network(run, name, path, teacher)
            if path and (said := reordered(recorded(network, path), run.data.class_names)):
                run.logger.say(f"{path}: {said}")
            networks[name][which] = Teacher(network).to(run.accelerator.device)
    return networks


# ---- scores


def score(run: Run, networks: Networks) -> dict[str, Any]:
    """Every metric of every network on validation and test, and the paired difference of student and control.

    The test split is read here only. Metrics are those of `kd.metrics.METRICS` that need logits, targets and the
    teacher's last logits; "reliability" has the bins of a reliability diagram of the last weights on test.
    """
    size, splits = run.recipe.train.batch_size, {"val": run.data.val, "test": run.data.test}
    shown = {name: run.teacher_data if name == "teacher" else run.data for name in networks}
    scores: dict[str, Any] = {name: {which: {} for which in WEIGHTS} for name in networks}
    difference: dict[str, Any] = {which: {} for which in WEIGHTS}
    teacher: dict[str, Tensor] = {}
    for which, (s, split) in itertools.product(WEIGHTS, splits.items()):
        logits = {
            name: predict(each[which], getattr(shown[name], s), size, run.accelerator)
            for name, each in networks.items()
        }
        teacher.setdefault(s, logits["teacher"])  # the last weights, which also taught the selected ones
        for name, own in logits.items():
            known = {"logits": own, "targets": split.targets, "teacher": teacher[s]}
            scores[name][which][s] = compute(known, s, name)
            if (which, s) == ("last", "test"):
                scores[name][which][s]["reliability"] = reliability_bins(own, split.targets)
        if "control" in logits:
            difference[which][s] = paired_difference(logits["student"], logits["control"], split.targets)
    return scores | ({"difference": difference} if run.recipe.control else {})


def paired_difference(a: Tensor, b: Tensor, targets: Tensor) -> dict[str, float]:
    """Top-1 accuracy of logits `a` (n, K) minus that of `b` on the same images, with its paired standard error.

    d_i = 1{a right on i} - 1{b right on i};  top1 = mean d;  standard_error = sd(d) / sqrt(n).
    The error covers the choice of images only, not that of the seed. Accuracies up to `chance` may be guesses.
    """
    d = (a.argmax(-1) == targets).double() - (b.argmax(-1) == targets).double()
    n = len(d)
    error = float(d.std()) / math.sqrt(n) if n > 1 else 0.0
    return {"top1": float(d.mean()), "standard_error": error, "n": n, "chance": chance(targets)[1]}


# ---- result.json


def write_result(run: Run) -> dict[str, Any]:
    """Score a run and write result.json, on the main process; every process takes part in the scoring."""
    networks = load_networks(run)
    result: dict[str, Any] = {"recipe": run.recipe.name, **score(run, networks)}
    for name, by_weights in networks.items():
        result[name] |= _about(run, name, by_weights["last"])
    result["provenance"] = origin(run) | {"seconds": sum(result[name]["seconds"] for name in networks)}
    if run.accelerator.is_main_process:
        write_json(run.directory / "result.json", result)
    run.accelerator.wait_for_everyone()  # another process may read it next
    return result


def origin(run: Run) -> dict[str, Any]:
    """What decides a run's result: code, versions, hardware, recipe, data and the teacher's file."""
    left_out = {"unreadable_images": run.data.unreadable} if run.data.unreadable else {}
    return (
        provenance(run.accelerator.num_processes)
        | left_out
        | {
            "recipe_hash": content_hash(identity(run.recipe)),
            "data_hash": run.data.hash,
            "teacher_file": checkpoint_hash(run.recipe),
            "weight_files": weight_files(run.recipe.teacher, run.recipe.student),
            "seed": run.recipe.seed,
        }
    )


def _about(run: Run, name: str, network: Teacher) -> dict[str, Any]:
    """The model of a stage, where its weights came from and what they cost."""
    recipe = run.recipe
    section = recipe.teacher if name == "teacher" else recipe.student
    about = {"model": section.model, "parameters": sum(p.numel() for p in network.model.parameters())}
    path = run.weights(name)
    if path is None:
        record = recorded_smoothing(recipe)
        smoothing = {"label_smoothing": record[0], "smoothing": record[1]} if record else {}
        return about | {"weights": recipe.teacher.checkpoint or "timm", "seconds": 0.0, **smoothing}
    manifest = finished(path)
    smoothed = recipe.teacher if name == "teacher" else recipe.loss
    return about | {
        "weights": str(path),
        "sha256": manifest["files"][path.name]["sha256"],
        "updates": manifest["updates"],
        "seconds": manifest["seconds"],
        "selected_epoch": manifest["selected"]["epoch"],
        "skipped_updates": manifest.get("skipped", 0),  # by fp16's gradient scaler
        **smoothing_of(smoothed),
    }


def read_result(path: Path) -> dict[str, Any]:
    """A result.json. Raises CheckpointError where it is missing, damaged or has no results."""
    with advised("give the directory of a finished run, checkpoints/NAME/RUN"):
        return read_json(path, ("provenance", "teacher", "student"))


def largest_difference(before: dict[str, Any], now: dict[str, Any]) -> tuple[float, str]:
    """The largest difference between the figures of two results, and the figure's name.

    An older kd had fewer metrics: only figures of both are compared.
    """
    old, new = (dict(_figures(result)) for result in (before, now))
    return max((abs(new[name] - old[name]), name) for name in new.keys() & old.keys())


def _figures(result: dict[str, Any]) -> Iterator[tuple[str, float]]:
    # Counts of reliability bins jump where a confidence is at the edge of its bin.
    for name, value in leaves(result):
        if set(WEIGHTS) & set(name.split(".")) and "reliability" not in name and isinstance(value, int | float):
            yield name, value


# ---- for people


def verdict(result: dict[str, Any]) -> tuple[int, str, str]:
    """Whether distillation helped: 1 or -1 where student − control is beyond two standard errors, else 0; that
    difference in words; and what it says of distillation.
    """
    if "difference" not in result:
        return 0, "", "no control was trained (control=false): nothing says whether distillation helped"
    d = result["difference"]["last"]["test"]
    top1, error = 100 * d["top1"], 100 * d["standard_error"]
    words = f"student − control: {top1:+.2f} ± {error:.2f} points of test top-1 "
    words += f"(paired standard error, {d['n']} images, one seed)"
    updates = result["student"].get("updates", FEWEST_UPDATES)  # an older kd did not write them
    if d["n"] < FEWEST_IMAGES or updates < FEWEST_UPDATES:
        few = f"{d['n']} test images" if d["n"] < FEWEST_IMAGES else f"{updates} updates"
        return 0, words, f"distillation cannot be judged from {few}"
    if "chance" in d and max(result[name]["last"]["test"]["top1"] for name in ("student", "control")) <= d["chance"]:
        why = f"student and control are no better than chance (≤ {d['chance']:.1%} on test)"
        return 0, words, f"distillation cannot be judged: {why}"
    tone = (top1 > 2 * error) - (top1 < -2 * error)
    return tone, words, f"distillation {('made no difference beyond chance', 'helped', 'hurt')[tone]}"


def print_result(result: dict[str, Any], console: Console) -> None:
    """Print the table of a result and its verdict."""
    pair = escape(" teaches ".join(plain(result[name]["model"], 200) for name in ("teacher", "student")))
    table = Table(title=f"{pair}: last weights on the test split", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    for column in ("val", "top-1", "selected", "nll", "ece", "brier", "agree"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in (name for name in STAGES if name in result):
        table.add_row(name, *_cells(result[name]))
    console.print(table)
    for line in filter(None, verdict(result)[1:]):
        console.print(line, highlight=False, markup=False)


def _cells(network: dict[str, Any]) -> Iterator[str]:
    test = network["last"]["test"]
    for top1 in (network["last"]["val"]["top1"], test["top1"], network["selected"]["test"]["top1"]):
        yield f"{top1:.2%}"
    for name in ("nll", "ece", "brier"):
        yield f"{test[name]:.4f}"
    yield f"{test['agreement']:.2%}" if "agreement" in test else ""
