"""What --help lists: recipes with their claims, names of data sets and methods, and settings."""

import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

from kd.config.compose import recipe_files
from kd.config.schema import allowed
from kd.config.types import settings
from kd.config.yaml_reader import MAX_BYTES
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


def name_lines(names: Iterable[str]) -> str:
    """Names side by side, on as many lines as they need."""
    return textwrap.fill(", ".join(names), WIDTH, initial_indent="  ", subsequent_indent="  ")
