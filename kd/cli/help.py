"""The text of --help: recipes with their claims, data sets, methods and settings."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from kd.config import yaml_reader
from kd.config.compose import recipe_files
from kd.config.schema import allowed
from kd.config.types import settings
from kd.losses.methods import registry as methods
from kd.text import plain


def claim(path: Path) -> str:
    """The claim on top of a recipe."""
    if not path.is_file():  # a FIFO would wait for somebody to write
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        found = re.search(r"^# claim:\s*(.+)$", file.read(yaml_reader.MAX_BYTES), re.MULTILINE)
    return plain(found[1]) if found else ""


def help_text(program: str) -> str:
    """What --help prints; nothing is imported for it."""
    lines = [
        f"usage: python -m {program} recipe=NAME [key=value ...]",
        "",
        "Trains a teacher, distils a student, trains the same student alone, and says which was better.",
        "Run it again to go on: a stopped run where it was saved last, a finished one with its result at once.",
        "",
        "recipes",
        *(f"  {name:24} {claim(path)}" for name, path in recipe_files().items()),
        "",
        "data sets (data=NAME brings its usual schedule; a recipe's own settings win)",
        f"  {', '.join(recipe_files('data'))}",
        "",
        "methods (loss=NAME, or several as loss=[A,B]; NAME:imagenet takes another of its presets)",
        *(f"  {line}" for line in textwrap.wrap(", ".join(sorted(methods.names())), 100)),
        "",
        "settings",
    ]
    for name, f in settings().items():
        limits = allowed(f.metadata)
        lines.append(f"  {name:32} {f.metadata['doc']}" + (f" [{limits}]" if limits else ""))
    lines += [
        "",
        "  --cfg job     print the resolved recipe and stop",
        "  -m, --multirun key=a,b   one run for each value",
        "  --import FILE.py         a file of yours, or a module, with a method of your own; may be repeated",
        "  replay=DIR    train a finished run again from its recipe, and say whether weights and scores are identical;",
        "                allow_differences=true: with other versions, hardware or data too; output=FOLDER: where",
        "  dry_run=true  build everything, take two steps, print the plan, write nothing",
        "",
        "Exit code 0 when it is done, or saved after SIGTERM or SIGUSR1; 1 when it cannot go on (a loss that is not",
        "finite, a lost process) or a replay differs; 2 when a setting or a file is wrong; 130 after ctrl-C.",
        "",
        f"example: python -m {program} recipe=resnet50_to_18 loss.temperature=2 seed=1",
    ]
    return "\n".join(lines)
