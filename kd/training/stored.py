"""A run's run.json and result.json as they are read again. They may be a stranger's: every entry that anything reads is
checked first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kd.checkpoint.layout import ANY, NUMBER, Each, check, short
from kd.config.types import leaves
from kd.errors import ConfigError

SCORE = {**dict.fromkeys(("top1", "nll", "ece", "brier"), NUMBER), "agreement?": NUMBER}
SPLITS = {"val": SCORE, "test": SCORE}
NETWORK = {"model": str, "weights": str, "sha256?": str, "last": SPLITS, "selected": SPLITS}
PAIRED = {"top1": NUMBER, "standard_error": NUMBER, "n": int}
RESULT = {
    "provenance": {"recipe_hash": str, "versions": Each(ANY), "hardware": Each(ANY)},
    "teacher": NETWORK,
    "student": NETWORK,
    "control?": NETWORK,
    "difference?": {which: {"val": PAIRED, "test": PAIRED} for which in ("last", "selected")},
}


CARD = {"identity": Each(ANY), "data_hash": str, "teacher_checkpoint_hash": str}


def read_result(path: Path) -> dict[str, Any]:
    """A result.json. Raises CheckpointError, which names file and entry, where it is not laid out as kd writes it."""
    return _read(path, RESULT, "; give the result of a finished run")


def read_card(path: Path) -> dict[str, Any]:
    """A run.json. Raises CheckpointError as `read_result` does."""
    from kd.errors import CheckpointError

    card = _read(path, CARD, hint := "; restore it, or resume=false to set that run aside")
    if other := sorted(card.keys() - CARD):  # the stages' files say by the whole card whose they are
        raise CheckpointError(f"{path}: {short(other[0])}: kd writes no such entry{hint}")
    return card


def _read(path: Path, layout: Any, hint: str) -> dict[str, Any]:
    from kd.checkpoint import read_json  # and with it torch
    from kd.checkpoint.files import Unreadable
    from kd.errors import CheckpointError

    try:
        values = read_json(path)
    except Unreadable:  # it may be whole
        raise
    except CheckpointError as error:
        raise CheckpointError(f"{error}{hint}") from error
    try:
        check(path, values, layout, hint)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return values


def numbers(tree: dict[str, Any]) -> dict[str, float]:
    """Every number of nested dicts by its dotted name."""
    return {name: v for name, v in leaves(tree) if isinstance(v, int | float) and not isinstance(v, bool)}
