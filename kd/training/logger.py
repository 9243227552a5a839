"""What a run says while it trains: metrics.jsonl, the progress bar and the tracker, from the main process only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kd.checkpoint import open_in_place, regular, write_text, writing
from kd.text import shown


class Journal:
    """One per metrics.jsonl; every line is one JSON object with its stage and update."""

    def __init__(self, path: Path, accelerator: Accelerator, console: Console):
        self.path, self.accelerator, self.console = path, accelerator, console
        self._bar: Progress | None = None

    def rewind(self, stage: str, update: int, epochs: int) -> None:
        """Forget what a killed process wrote of a stage after its last saved update, of which so many epochs were
        validated: it will be written again. Lines that are none of ours, torn by a kill, go too.

        Raises CheckpointError.
        """
        if not self.accelerator.is_main_process or not os.path.lexists(self.path):
            return
        regular(self.path, 0, follow=False)
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _kept(line, stage, update, epochs)]
        write_text(self.path, "".join(f"{line}\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; a value that is not finite is written as null, since JSON has no NaN.

        Raises CheckpointError.
        """
        if not self.accelerator.is_main_process:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        text = json.dumps(finite) + "\n"
        with writing(self.path, len(text)), open_in_place(self.path) as file:
            file.write(text)
        scalars = {f"{values['stage']}/{k}": v for k, v in finite.items() if isinstance(v, float)}
        self.accelerator.log(scalars, step=values["update"])

    def flush(self) -> None:
        """Bring what was written to the disk. Raises CheckpointError."""
        if self.accelerator.is_main_process and os.path.lexists(self.path):
            with writing(self.path, 0), open_in_place(self.path) as file:
                os.fsync(file.fileno())

    @contextmanager
    def progress(self, stage: str, total: int, done: int) -> Iterator[None]:
        """A bar over the updates of a stage, where a person is looking."""
        if not (self.accelerator.is_main_process and self.console.is_terminal):
            yield
            return
        columns = (TextColumn(f"{stage:8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as self._bar:
            self._bar.add_task(stage, total=total, completed=done)
            yield
        self._bar = None

    def advance(self, update: int) -> None:
        """Move the bar."""
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=update)

    def epoch(self, stage: str, epoch: int, epochs: int, top1: float, nll: float, skipped: int = 0) -> None:
        """One plain line after each epoch; `skipped`: updates so far that fp16's scaler left out."""
        more = f"   {skipped} updates skipped (fp16)" if skipped else ""
        self.say(f"{stage:8} epoch {epoch:>3}/{epochs}   validation top-1 {top1:6.2%}   nll {nll:.4f}{more}")

    def say(self, text: str) -> None:
        """Print a line once, not once per process, and never wrapped: it may be a path."""
        if self.accelerator.is_main_process:
            text = "\n".join(map(shown, text.split("\n")))
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def _kept(line: str, stage: str, update: int, epochs: int) -> bool:
    try:
        entry = json.loads(line)
        if entry["stage"] != stage:
            return True
        return entry["epoch"] < epochs if "val_top1" in entry else entry["update"] <= update
    except (ValueError, TypeError, KeyError, RecursionError):
        return False
