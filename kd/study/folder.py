"""A study's folder: where each file is, and points written so that a kill loses no finished one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd.checkpoint import read_json, write_json
from kd.config import compose
from kd.errors import CheckpointError, ConfigError
from kd.runtime.lock import alone
from kd.study.checks import SCHEMA, check_card, check_point
from kd.study.grid import Point


class Folder:
    """The files of one study; the package's docstring has the layout."""

    def __init__(self, path: Path):
        self.path = path
        self.card, self.table = path / "study.json", path / "table.csv"

    def point(self, identifier: str) -> Path:
        """The JSON of a point."""
        return self.path / "points" / f"{identifier}.json"

    def weights(self, identifier: str) -> Path:
        """The weights of a teacher."""
        return self.path / "teachers" / f"{identifier}.safetensors"

    def job(self, name: str) -> Path:
        """What a launched process is to do."""
        return self.path / "jobs" / f"{name}.json"

    def found(self, identifier: str) -> dict[str, Any] | None:
        """A point as it was written, finished or failed; None where it was not. Raises ConfigError for what is none."""
        path = self.point(identifier)
        if not path.exists():
            return None
        check_point(path, identifier, point := _read(path))
        return point

    def is_finished(self, point: Point) -> bool:
        """Whether there is nothing left to do for a point; a failed one is tried again."""
        found = self.found(point.id)
        return found is not None and found["state"] == "finished"

    def write_point(self, point: Point, outcome: Mapping[str, Any]) -> None:
        """Write a point once: what is finished is never written again."""
        if self.is_finished(point):
            return
        card = {key: getattr(point, key) for key in ("id", "role", "control")}
        state = {"state": "failed" if "error" in outcome else "finished", "error": outcome.get("error")}
        measured = {key: outcome.get(key, {}) for key in ("metrics", "detail")}
        provenance = outcome["provenance"] | {"data_hash": point.data_hash}
        rest = {"seed": point.recipe.seed, "settings": point.settings, "teacher": point.teacher}
        write_json(
            self.point(point.id), {"schema": SCHEMA, **card, **state, **rest, **measured, "provenance": provenance}
        )

    def replaced(self, points: Iterable[str]) -> str | None:
        """What to say where the folder's card is of a grid of other points than these, and is about to be replaced.

        Raises ConfigError for a study.json that this kd could not have written: it is somebody's.
        """
        if not os.path.lexists(self.card):
            return None
        try:
            check_card(self.card, found := _read(self.card))
        except ConfigError as error:
            raise ConfigError(f"{error}; move it away, or choose another output=FOLDER") from error
        before = set(found["points"])
        if before == (now := set(points)):
            return None
        return (
            f"study.json was of another grid, of {len(before)} points, and is now of this one, of {len(now)}; the "
            f"other's finished points are kept, and its own command makes it study.json again"
        )

    @contextmanager
    def lock(self, name: str, wait: bool) -> Iterator[None]:
        """Hold a lock that ends with the process, however that ends. Raises ConfigError where `wait` is false."""

        def busy(holder: str) -> None:
            if not wait:
                raise ConfigError(
                    f"{self.path}: {holder} is running this study; wait for it, or choose another output=FOLDER"
                )
            time.sleep(0.5)

        with alone(self.path / "jobs" / name, busy):
            yield


def packed(point: Point) -> dict[str, Any]:
    """A point as a job's file has it."""
    return {
        "id": point.id,
        "role": point.role,
        "control": point.control,
        "teacher": point.teacher,
        "data_hash": point.data_hash,
        "recipe": asdict(point.recipe),
    }


def unpacked(values: dict[str, Any]) -> Point:
    """The inverse of `packed`."""
    return Point(**{**values, "recipe": compose.build(values["recipe"])})


def read_card(folder: Path) -> dict[str, Any]:
    """The card of a study's folder. Raises ConfigError where it is none."""
    path = Path(folder) / "study.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: holds no study.json; give the folder of a study")
    check_card(path, card := _read(path))
    return card


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except RecursionError as error:
        raise ConfigError(f"{path}: is nested too deeply") from error
