"""The text of --help: recipes with their claims, data sets, methods and settings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from kd.config.compose import recipe_files
from kd.config.schema import Recipe, allowed
from kd.config.types import settings
from kd.config.yaml_reader import MAX_BYTES
from kd.losses.methods import registry as methods
from kd.text import plain

WIDTH = 100


def claim(path: Path) -> str:
    """The claim at the top of a recipe file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        claimed = re.search(r"^# claim:\s*(.+)$", file.read(MAX_BYTES), re.MULTILINE)
    return plain(claimed[1]) if claimed else ""


def recipe_lines(folder: str = "") -> Iterator[str]:
    """A line for each recipe, with as much of its claim as fits."""
    for name, path in recipe_files(folder).items():
        typed = f"{folder}/{name}" if folder else name
        yield f"  {typed:26} {textwrap.shorten(claim(path), WIDTH - 29, placeholder=' ...')}"


def setting_lines(schema: type, prefix: str = "", everything: bool = True) -> Iterator[str]:
    """A line for each setting whose name begins with `prefix`; without `everything` the common ones only."""
    for name, field in settings(schema).items():
        if name.startswith(prefix) and (everything or field.metadata["common"]):
            limits = f" [{limits}]" if (limits := allowed(field.metadata)) else ""
            line = f"{name:25} {field.metadata['doc']}{limits}"
            yield textwrap.fill(line, WIDTH, initial_indent="  ", subsequent_indent=" " * 30)


TRAIN = """usage: python -m kd.train recipe=NAME [key=value ...]

Trains a teacher, distils a student, trains the same student alone, and compares the two. The same
command resumes a stopped run from its last checkpoint, and prints the result of a finished one.

recipes
{recipes}

data=NAME, a data set with its usual training schedule (the recipe's own settings override it)
{data}

loss=NAME or loss=[A,B], a distillation method or several; NAME:imagenet is another of its presets
{methods}

settings{which}
{settings}

  --cfg job          print the resolved recipe and exit
  -m key=A,B         train one run after another, one for each value
  --import FILE.py   import a method of your own, from a file or a module
  replay=DIR         train a finished run again and compare weights and scores; with output=DIR,
                     allow_differences=true for other versions, hardware or data

Exit code: 0 finished, or saved after SIGTERM or SIGUSR1; 1 cannot go on, or a replay differs;
2 a setting or a file is wrong; 130 ctrl-C.

example: python -m kd.train recipe=resnet50_to_18 loss.temperature=2 seed=1"""


def help_text(everything: bool = False) -> str:
    """The --help of kd.train; `everything` is --help all. Nothing but the recipe files is read for it."""

    def wrapped(names: Iterable[str]) -> str:
        return textwrap.fill(", ".join(names), WIDTH, initial_indent="  ", subsequent_indent="  ")

    return TRAIN.format(
        recipes="\n".join(recipe_lines()),
        data=wrapped(recipe_files("data")),
        methods=wrapped(sorted(methods.names())),
        which="" if everything else " (--help all lists the others)",
        settings="\n".join(setting_lines(Recipe, everything=everything)),
    )
