"""Metrics, progress bar and tracker of a run, all written by the main process only."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from kd.checkpoint.files import sync, write_text, writing
from kd.text import shown


class Logger:
    """Writes one metrics.jsonl, in which every line is a JSON object with its stage and update, and prints."""

    def __init__(self, path: Path, accelerator: Accelerator, console: Console):
        self.path, self.accelerator, self.console = path, accelerator, console
        self._bar = Progress(disable=True)

    def rewind(self, stage: str, update: int, epochs: int) -> None:
        """Drop lines logged after the last checkpoint, and truncated ones.

        The checkpoint of `stage` is of `update`, with `epochs` validated: what follows is logged again. Lines of other
        stages are kept. Raises CheckpointError.
        """
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _is_kept(line, stage, update, epochs)]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl and the tracker; NaN and infinities become null, which JSON has.

        Raises CheckpointError.
        """
        if not self.accelerator.is_main_process:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        text = json.dumps(finite) + "\n"
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        scalars = {f"{values['stage']}/{k}": v for k, v in finite.items() if isinstance(v, float)}
        self.accelerator.log(scalars, step=values["update"])

    def flush(self) -> None:
        """Have the lines reach the disk. Raises CheckpointError."""
        if self.accelerator.is_main_process and self.path.exists():
            with writing(self.path):
                sync(self.path)

    @contextmanager
    def progress(self, stage: str, total: int, done: int) -> Iterator[None]:
        """A progress bar over the updates of a stage, on a terminal."""
        columns = (TextColumn(f"{stage:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        hidden = not (self.accelerator.is_main_process and self.console.is_terminal)
        with Progress(*columns, console=self.console, transient=True, disable=hidden) as self._bar:
            self._bar.add_task(stage, total=total, completed=done)
            yield

    def advance(self, update: int) -> None:
        """Move the progress bar."""
        self._bar.update(self._bar.task_ids[0], completed=update)

    def say(self, text: str) -> None:
        """Print lines once, not once per process, and never wrapped: a path can then be copied."""
        if self.accelerator.is_main_process:
            text = "\n".join(map(shown, text.split("\n")))
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)

    def show(self, table: Table) -> None:
        """Print a table once, not once per process."""
        if self.accelerator.is_main_process:
            self.console.print(table)


def _is_kept(line: str, stage: str, update: int, epochs: int) -> bool:
    try:
        entry = json.loads(line)
        if entry["stage"] != stage:
            return True
        return entry["epoch"] < epochs if "val_top1" in entry else entry["update"] <= update
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
