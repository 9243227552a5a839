"""What a process finds around it: streams that may be closed, full or of ASCII, its folder, a launcher's variables."""

from __future__ import annotations

import io
import os
import re
import sys

from kd.errors import ConfigError

GROUP = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
LAUNCHER = "torchrun sets it, one process needs none"


def ready_streams() -> None:
    """Have stdout and stderr take whatever is printed: closed ones nothing, one of ASCII an escape for all else."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # or the next file that is opened would be printed into
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process is)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def drop(stream: int) -> None:
    """Print no more to 1, stdout, or 2, stderr: what is left would fail again when Python ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream)
    os.close(nothing)


def complain(text: str) -> None:
    """Print a line to stderr; where that cannot be, the exit code alone has to say it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        drop(2)


def check(trains: bool = True) -> None:
    """Raise ConfigError where the current folder is gone, or a launcher's variables are not what torchrun sets.

    A program that does not train takes no part in a group, whatever a job's script has set.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        _check_number(name, os.environ.get(name, "0"))
    if trains:
        _check_group({name: os.environ[name] for name in GROUP if name in os.environ})
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the current folder is no more; must be one that exists") from error


def _check_number(name: str, value: str) -> None:
    if not re.fullmatch(r"[0-9]{1,9}", value):
        raise ConfigError(f"{name}={value}: must be a whole number; {LAUNCHER}")


def _check_group(found: dict[str, str]) -> None:
    """The variables of one process of several; a process that is alone may have any MASTER_PORT, as in a pod."""
    rank, world = int(found.get("RANK", "0")), int(found.get("WORLD_SIZE", "1"))
    if not rank < world:
        raise ConfigError(f"RANK={rank}: must be < WORLD_SIZE={world}, which must be > 0; {LAUNCHER}")
    if "LOCAL_RANK" not in found and world == 1:
        return
    if missing := [name for name in GROUP if name not in found]:
        raise ConfigError(f"{missing[0]}: is not set, but {', '.join(found)}; {LAUNCHER}")
    _check_number("MASTER_PORT", found["MASTER_PORT"])
