"""What ``dry_run=true`` prints: everything built, two updates taken, nothing written."""

from datetime import timedelta

import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from kd.models.layers import list_layers
from kd.models.wrappers import Teacher
from kd.text import shown
from kd.training.loop import Trainer
from kd.training.pipeline import (
    control_stage,
    say_images,
    student_network,
    student_stage,
    teacher_network,
    teacher_stage,
)
from kd.training.run import Run, teacher_is_trained


def print_plan(run: Run) -> None:
    """Build each stage that the command would train, time two of its updates, and print the sum."""
    say, data = run.logger.say, run.data
    sizes = " / ".join(str(len(split)) for split in (data.train, data.val, data.test))
    say(f"data     {run.recipe.data.name}: {sizes} train / val / test images, {data.num_classes} classes")
    say_images(run)
    teacher = Teacher(teacher_network(run)).to(run.accelerator.device)
    stages = [student_stage(run, teacher)] + ([control_stage(run)] if run.recipe.control else [])
    if not teacher_is_trained(run.recipe):
        say(f"teacher  {run.recipe.teacher.model}, as it is")
    elif run.is_finished("teacher"):
        say(f"teacher  found in {run.teacher_directory}")
    else:
        stages.insert(0, teacher_stage(run))
    table = Table("stage", "model", "parameters", "updates", "s/update", "estimate", "GPU memory")
    total = 0.0
    for stage in stages:
        # Memory is the peak so far: a stage that comes later may need less than it says.
        trainer = Trainer(stage, run)
        seconds = trainer.measure()
        total += seconds * trainer.updates
        size = sum(p.numel() for p in stage.model.parameters())
        row = (f"{size:,}", str(trainer.updates), f"{seconds:.3f}", duration(seconds * trainer.updates))
        model = run.recipe.teacher.model if stage.name == "teacher" else run.recipe.student.model
        table.add_row(stage.name, escape(shown(model)), *row, f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
    run.logger.show(table)
    if (run.directory / "result.json").exists():
        say("finished before: the same command without dry_run prints its result at once")
    say(f"about {duration(total)} in all, without evaluation; would write {run.directory}")


def print_layers(run: Run) -> None:
    """Print every layer of both networks with the shape of its output."""
    networks = (("teacher", teacher_network(run), run.teacher_data), ("student", student_network(run), run.data))
    for role, network, data in networks:
        table = Table("layer", "kind", "shape", title=f"{role}.layers", title_justify="left", box=SIMPLE_HEAD)
        for name, (kind, shape) in list_layers(network, data.input_shape).items():
            table.add_row(escape(shown(name)), escape(kind), " x ".join(map(str, shape[1:])))
        run.logger.show(table)


def duration(seconds: float) -> str:
    """Seconds as days, hours, minutes and seconds, such as 1 day, 2:03:04."""
    return str(timedelta(seconds=round(seconds)))
