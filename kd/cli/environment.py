"""Checks torchrun's environment variables."""

from __future__ import annotations

import os

from kd.errors import ConfigError

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_torchrun() -> None:
    """Raise ConfigError where some of torchrun's variables are set and others are not.

    A process that is alone may have some of them: a pod has RANK, and MASTER_PORT of a service named master.
    """
    missing = [name for name in TORCHRUN if name not in os.environ]
    world = os.environ.get("WORLD_SIZE", "1")
    if missing and ("LOCAL_RANK" in os.environ or world != "1"):
        raise ConfigError(f"{', '.join(missing)}: not set beside WORLD_SIZE={world}; torchrun sets all of them")


def speaks() -> bool:
    """Whether this process prints an error that all processes of torchrun have. A pod's RANK is not torchrun's."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"
