"""What ``dry_run=true`` prints: everything built, two updates taken, nothing written."""

from __future__ import annotations

import resource
import sys

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from torch import nn

from kd.models.layers import list_layers, tap
from kd.models.wrappers import Teacher
from kd.text import shown
from kd.training.loop import Trainer
from kd.training.pipeline import control_stage, student_network, student_stage, teacher_network, teacher_stage
from kd.training.run import Run, teacher_is_trained


def peak_memory() -> int:
    """Most bytes this process has held: of GPU memory where there is a GPU, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_plan(run: Run) -> None:
    """Build each stage that the command would train, measure two of its updates, and print the sum."""
    console = run.logger.console
    sizes = " / ".join(str(len(split)) for split in (run.data.train, run.data.val, run.data.test))
    lines = [f"data     {run.data.name}: {sizes} train / val / test images, {run.data.num_classes} classes"]
    table = Table("stage", "model", "parameters", "updates", "s/update", "estimate", "memory")
    teacher = Teacher(teacher_network(run)).to(run.accelerator.device)
    stages = [student_stage(run, teacher)] + ([control_stage(run)] if run.recipe.control else [])
    if not teacher_is_trained(run.recipe):
        lines.append(f"teacher  {run.recipe.teacher.model}, as it is")
    elif (run.teacher_directory / "stage.json").exists():
        lines.append(f"teacher  found in {run.teacher_directory}")
    else:
        stages.insert(0, teacher_stage(run))
    total = 0.0
    for stage in stages:
        trainer = Trainer(stage, run.recipe, run.accelerator, run.logger, owner={})
        seconds = trainer.measure()
        total += seconds * trainer.updates
        size = sum(p.numel() for p in stage.model.parameters())
        row = (f"{size / 1e6:.2f} M", str(trainer.updates), f"{seconds:.3f}", duration(seconds * trainer.updates))
        table.add_row(stage.name, escape(shown(stage.metadata["model"])), *row, f"{peak_memory() / 2**30:.2f} GiB")
    if run.accelerator.is_main_process:
        console.print("\n".join(map(shown, lines)), soft_wrap=True, highlight=False, markup=False)
        console.print(table)
        if (run.directory / "result.json").exists():
            console.print("finished before: the same command without dry_run prints its result at once", soft_wrap=True)
        console.print(
            f"about {duration(total)} in all, without evaluation; would write {shown(run.directory)}",
            soft_wrap=True,
            markup=False,
        )


def print_layers(run: Run) -> None:
    """Every layer of both networks with what it gives for one image; marked: what feature methods read by default."""
    console = run.logger.console
    for role, net in (("teacher", teacher_network(run)), ("student", student_network(run))):
        read = _read_by_default(net)
        table = Table("", "layer", "kind", "shape", title=f"{role}.layers", title_justify="left", box=SIMPLE_HEAD)
        for layer in list_layers(net, run.data.input_shape):
            table.add_row(
                "*" if layer.name in read else "",
                escape(shown(layer.name)),
                escape(layer.kind),
                " x ".join(map(str, layer.shape[1:])),
            )
        if run.accelerator.is_main_process:
            console.print(table)
    if run.accelerator.is_main_process:
        console.print("* read where no layers are named", highlight=False, markup=False)


def _read_by_default(net: nn.Module) -> tuple[str, ...]:
    try:
        return tap(net).layers
    except ValueError:  # it states no stages: layers must be named
        return ()


def duration(seconds: float) -> str:
    """Seconds in the units a person would use."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
