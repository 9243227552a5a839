"""A run's result.json as it is read again. It may be a stranger's: every entry that anything reads is checked first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.layout import ANY, NUMBER, Each, check
from kd.recipe import ConfigError

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


def read_result(path: Path) -> dict[str, Any]:
    """A result.json. Raises CheckpointError, which names file and entry, where it is not laid out as kd writes it."""
    from kd.checkpoint import CheckpointError, read_json  # and with it torch

    values = read_json(path)
    try:
        check(path, values, RESULT, "; give the result of a finished run")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    return values


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of nested dicts with its dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
