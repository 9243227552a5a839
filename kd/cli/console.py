"""The console that commands print on."""

import sys

from rich.console import Console


def terminal() -> Console:
    """The terminal, or 120 columns for a pipe or a log file, which have no width of their own."""
    return Console(width=None if sys.stdout.isatty() else 120, emoji=False)
