"""A run's run.json and result.json, read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.checkpoint.files import advised, read_json


def read_result(path: Path) -> dict[str, Any]:
    """A result.json. Raises CheckpointError where it is missing, damaged or has no results."""
    with advised("give the result of a finished run"):
        return read_json(path, ("provenance", "teacher", "student"))


def read_card(path: Path) -> dict[str, Any]:
    """A run.json, which identifies a run. Raises CheckpointError where it is missing, damaged or something else."""
    with advised("restore it, or resume=false to set that run aside"):
        return read_json(path, ("identity", "data_hash", "teacher_checkpoint_hash"))
