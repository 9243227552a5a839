"""What a process finds around it: streams that may be closed, full or of ASCII, its folder, a launcher's variables."""

from __future__ import annotations

import io
import os
import re
import sys

from kd.recipe import ConfigError


def ready_streams() -> None:
    """Have stdout and stderr take whatever is printed: closed ones nothing, one of ASCII an escape for all else."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process is)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Print no more: what is left would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def check() -> None:
    """Raise ConfigError where the current folder is gone, or a launcher's variables are not what torchrun sets."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not re.fullmatch(r"\d{1,9}", value := os.environ.get(name, "0")):
            raise ConfigError(f"{name}={value}: must be a whole number; torchrun sets it, one process needs none")
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder is no more; must be one that exists") from error
