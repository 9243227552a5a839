"""Files of a study's directory; points are written atomically and once."""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kd.checkpoint.files import read_json, write_json
from kd.errors import ConfigError
from kd.runtime.lock import locked
from kd.study.grid import Point

SCHEMA = 1  # of study.json and of points


class Folder:
    """The files of one study; the docstring of `kd.study` has the layout."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.card, self.table = self.path / "study.json", self.path / "table.csv"

    def point(self, identifier: str) -> Path:
        """The JSON file of a point."""
        return self.path / "points" / f"{identifier}.json"

    def weights(self, identifier: str) -> Path:
        """The weights of a teacher."""
        return self.path / "teachers" / f"{identifier}.safetensors"

    def job(self, name: str) -> Path:
        """What a launched process is to do."""
        return self.path / "jobs" / f"{name}.json"

    def read_card(self) -> dict[str, Any]:
        """study.json. Raises ConfigError where there is none, or where it is of another version of kd."""
        if not self.card.is_file():
            raise ConfigError(f"{self.path}: holds no study.json; give the directory of a study")
        return _read(self.card)

    def read_point(self, identifier: str) -> dict[str, Any] | None:
        """A point, finished or failed; None where it has not been written."""
        path = self.point(identifier)
        return _read(path) if path.exists() else None

    def is_finished(self, point: Point) -> bool:
        """Whether a point is done; a failed one is tried again."""
        written = self.read_point(point.id)
        return written is not None and written["state"] == "finished"

    def write_point(self, point: Point, outcome: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write a point's outcome, `metrics` and `detail` or `error`, unless the point is finished already."""
        if self.is_finished(point):
            return
        values = {
            "schema": SCHEMA,
            "id": point.id,
            "role": point.role,
            "control": point.control,
            "state": "failed" if "error" in outcome else "finished",
            "error": outcome.get("error"),
            "seed": point.recipe.seed,
            "settings": point.settings,
            "teacher": point.teacher,
            "metrics": outcome.get("metrics", {}),
            "detail": outcome.get("detail", {}),
            "provenance": {**about, "seconds": outcome.get("seconds"), "data_hash": point.data_hash},
        }
        write_json(self.point(point.id), values)

    def lock(self, job: str | None = None) -> AbstractContextManager[bool]:
        """The lock of a job, for which this waits, or of the whole study: ConfigError where another process has it."""
        return locked(self.path / "jobs" / job, lambda holder: time.sleep(0.5)) if job else locked(self.path)


def train_again(teacher: str) -> str:
    """What to do about a teacher whose weights cannot be used."""
    return f"remove points/{teacher}.json there and the same command trains it again"


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path)
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise ConfigError(
            f"{path}: has schema {schema}, this kd reads {SCHEMA}; read it with the kd that wrote it, or run the study "
            f"again with another output=DIR"
        )
    return values
