"""Where commands print while they work."""

from __future__ import annotations

import sys

from rich.console import Console


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # the BrokenPipeError that it is called for; rich would exit without a word


def terminal() -> Console:
    """The terminal, or a log file, which has no width of its own."""
    return _Console(width=None if sys.stdout.isatty() else 120)
