"""The estimate of a teacher's label smoothing against the truth, on teachers trained here with known smoothing.

One row for each task, smoothing mass and split: mean and standard deviation of the estimate over the seeds, the
interquartile range over a network's samples (mean of its ends), how often the truth lies in it, and how often the
estimate came with a doubt. On the last tasks it should fail: networks that were not trained to the end, and mixup.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kd.config import compose
from kd.config.schema import Recipe
from kd.metrics import SmoothingEstimate
from kd.training import pipeline as stages
from kd.training.teacher_smoothing import estimate_teacher_smoothing as probe

MASSES = (0.0, 0.05, 0.1, 0.2, 0.4)


class Task(NamedTuple):
    data: str
    model: str
    changes: tuple[str, ...] = ()
    masses: tuple[float, ...] = MASSES

    @property
    def title(self) -> str:
        return " ".join([self.data, *self.changes])


TASKS = (Task("mixture", "mlp_mini"), Task("mnist1d", "mlp_small"))
# of a network that was smoothed not at all, and of one that was
FAILURES = (
    Task("mnist1d", "mlp_small", ("teacher.epochs=10",), (0.0, 0.1)),
    Task("digits", "cnn_small", ("data.image_size=8", "teacher.epochs=3"), (0.0, 0.1)),
    Task("digits", "cnn_small", ("data.image_size=8", "teacher.epochs=20", "data.mixup=0.4"), (0.0, 0.1)),
)


def recipe(task: Task, mass: float, seed: int, output: str) -> Recipe:
    own = {"name": "probe", "seed": seed, "output": output}
    teacher: dict[str, Any] = {"model": task.model, "label_smoothing": mass}
    data = compose.read_recipe(compose.recipe_files("data")[task.data])
    return compose.build(data, own | {"teacher": teacher, "student": {"model": "mlp_tiny"}}, words=task.changes)


def estimates(task: Task, mass: float, seed: int, output: str) -> dict[str, SmoothingEstimate]:
    """What the probe says of one teacher, by split."""
    run = stages.prepare(recipe(task, mass, seed, output))
    run.logger.console.quiet = True
    teacher = stages.find_teacher(run)
    size = run.recipe.train.batch_size
    return {split: probe(teacher, getattr(run.data, split), size, run.accelerator) for split in ("train", "val")}


def rows(task: Task, seeds: int, output: str) -> Iterator[str]:
    for mass in task.masses:
        by_seed = [estimates(task, mass, seed, output) for seed in range(seeds)]
        for split, name in (("train", "training"), ("val", "held out")):
            found = [each[split] for each in by_seed]
            spread = statistics.stdev(e.label_smoothing for e in found) if seeds > 1 else 0.0
            cells = (
                task.title,
                f"{mass:g}",
                name,
                f"{statistics.mean(e.label_smoothing for e in found):.3f} ± {spread:.3f}",
                f"{statistics.mean(e.low for e in found):.3f} .. {statistics.mean(e.high for e in found):.3f}",
                f"{sum(e.low <= mass <= e.high for e in found)}/{seeds}",
                f"{sum(bool(e.doubts) for e in found)}/{seeds}",
                f"{statistics.mean(e.accuracy for e in found):.1%}",
            )
            yield f"| {' | '.join(cells)} |"


def run(arguments: Sequence[str] | None = None) -> list[str]:
    """Train, estimate, print the table, and return its lines."""
    options = _options(arguments)
    started = time.monotonic()
    lines = [
        "| task | true eps | samples | estimate | middle half | truth inside | doubted | accuracy |",
        "|---" * 8 + "|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for task in [task for task in TASKS + FAILURES if task.data in options.data]:
            for row in rows(task, options.seeds, str(options.keep or folder)):
                print(row, flush=True)
                lines.append(row)
    took = f"{time.monotonic() - started:.0f} s, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"\n{options.seeds} seeds; {took}")
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return lines


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = sorted({task.data for task in TASKS + FAILURES})
    parser = argparse.ArgumentParser("python -m benchmarks.probe", description=__doc__)
    parser.add_argument("--data", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder to keep the teachers in, found again by another run")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run()
