"""Checks the working directory and torchrun's environment variables."""

from __future__ import annotations

import os
import re

from kd.errors import ConfigError

DEFAULTS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def check_directory() -> None:
    """Raise ConfigError where the working directory has been deleted."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigError("the working directory no longer exists; change to one that does") from error


def check_torchrun() -> None:
    """Raise ConfigError where torchrun's variables are not set as torchrun sets them.

    A process that is alone may have some of them: a pod has RANK, and MASTER_PORT of a service named master.
    """
    rank, local, world = (os.environ.get(name, default) for name, default in DEFAULTS.items())
    numbers = all(re.fullmatch("[0-9]+", value) for value in (rank, local, world))
    if not numbers or int(rank) >= int(world):
        said = f"RANK={rank} LOCAL_RANK={local} WORLD_SIZE={world}"
        raise ConfigError(f"{said}: must be whole numbers with RANK < WORLD_SIZE; torchrun sets them")
    missing = [name for name in (*DEFAULTS, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and ("LOCAL_RANK" in os.environ or world != "1"):
        raise ConfigError(f"{', '.join(missing)}: not set beside WORLD_SIZE={world}; torchrun sets all of them")


def speaks() -> bool:
    """Whether this process prints an error that all processes of torchrun have. A pod's RANK is not torchrun's."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"
