"""Grid of a study: its cells, the distinct networks (points) that they need, and the points of each contrast."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from kd.config import types
from kd.config.compose import build
from kd.config.schema import DataConfig, LossConfig, Recipe, StudentConfig, TeacherConfig, content_hash, identity
from kd.errors import require
from kd.metrics import METRICS
from kd.models.preprocess import own_preprocess
from kd.models.weights import checkpoint_hash, weight_files
from kd.study.axes import NotInGrid, Settings, expand, labelled
from kd.study.schema import Contrast, Sides, StudyRecipe
from kd.text import did_you_mean

if TYPE_CHECKING:
    from kd.data import Data, Preprocess

SECTIONS = {"teacher": ("teacher",), "student": ("teacher", "student", "loss"), "control": ("student", "loss")}


@dataclass(frozen=True)
class Point:
    """One network of a study."""

    id: str
    role: str  # teacher, student or control
    control: str | None  # hard, smoothed or bayes
    recipe: Recipe
    teacher: str | None  # id of its teacher
    data_hash: str

    @property
    def section(self) -> TeacherConfig | StudentConfig:
        """The section of the recipe that the network is built from."""
        return self.recipe.teacher if self.role == "teacher" else self.recipe.student

    @property
    def loss(self) -> LossConfig:
        """What the network minimises."""
        return self.recipe.teacher.own_loss() if self.role == "teacher" else self.recipe.loss

    @property
    def settings(self) -> Settings:
        """Every setting that decides the network, by dotted name."""
        return types.flat(_identity(self.role, self.recipe))


def base_recipe(study: StudyRecipe) -> Recipe:
    """The recipe from which every point departs, without the section `study`."""
    return Recipe(**{f.name: getattr(study, f.name) for f in fields(Recipe)})


# ---- the plan


class Plan:
    """A study spelled out.

    Parameters
    ----------
    study : the study's recipe
    load : loads a data set, of which a point's id has the content hash

    Attributes
    ----------
    axes, seeds : of the grid, as `labelled` has them
    points, data : by id and by content hash
    cells, controls, contrasts : as study.json has them
    left_out : contrasts that compare what the grid does not have, and why

    Raises ConfigError for settings that cannot work.
    """

    def __init__(self, study: StudyRecipe, load: Callable[[DataConfig], Data]):
        self.base, self.axes, self._load = base_recipe(study), labelled(study.study.grid), load
        self.seeds = range(study.seed, study.seed + study.study.seeds)
        self._control_smoothing = study.study.control_smoothing
        self._data_sets: dict[str, Data] = {}  # by their settings
        self._hashes: dict[str, list[Any]] = {}  # of files of weights, by the settings of their networks
        self.points: dict[str, Point] = {}
        self.cells: list[dict[str, Any]] = []
        self.controls: list[dict[str, Any]] = []
        self.contrasts: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self._add_cells(study.study.controls)
        for contrast in study.study.contrasts:
            try:
                self.contrasts.append(self._contrast(contrast))
            except NotInGrid as error:  # the command line may have narrowed the grid
                self.left_out.append(f"{contrast.name or contrast.metric}: {error}")
        self.data = {data.hash: data for data in self._data_sets.values()}

    def _add_cells(self, controls: Sequence[str]) -> None:
        """Add every cell with its student, its teacher and its controls."""
        # Building takes milliseconds, and every seed has the same recipes.
        recipes = [(labels, self._recipe(settings)) for labels, settings in self._combinations()]
        for seed, (labels, unseeded) in itertools.product(self.seeds, recipes):
            recipe = replace(unseeded, seed=seed)
            student = self._add(self._student(recipe))
            self._add(self._teacher(recipe))
            self.cells.append({"axes": labels, "seed": seed, "point": student.id})
            shared = {axis: label for axis, label in labels.items() if _changes_controls(self.axes[axis])}
            for name in controls:
                train = self._data(recipe.data).train
                known = train.posterior is not None and not train.augments  # of an augmented image it is not known
                require(
                    name != "bayes" or known,
                    f"study.controls: bayes needs a data set whose posterior is known, not {recipe.data.name}",
                )
                control = self._control(name, recipe)
                if self._add(control) is control:
                    self.controls.append({"control": name, "axes": shared, "seed": seed, "point": control.id})

    def _combinations(self) -> Iterator[tuple[Settings, Settings]]:
        """Each cell's value on every axis, and the settings that they stand for, a later axis over an earlier one."""
        for values in itertools.product(*(axis.items() for axis in self.axes.values())):
            labels = {axis: label for axis, (label, _) in zip(self.axes, values, strict=True)}
            yield labels, {key: value for _, settings in values for key, value in settings.items()}

    def _recipe(self, settings: Settings) -> Recipe:
        """The base recipe with these settings, checked."""
        values = asdict(self.base)
        for key, value in settings.items():
            *sections, last = key.split(".")
            node: Any = values
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = copy.deepcopy(value)  # another axis may change what is in it
        return build(values)

    # -- points

    def _add(self, point: Point) -> Point:
        """The point of this identity, which an earlier cell may have too."""
        return self.points.setdefault(point.id, point)

    def _teacher(self, recipe: Recipe) -> Point:
        return self._point("teacher", None, recipe, None)

    def _student(self, recipe: Recipe) -> Point:
        """The point of a recipe's student. Raises ConfigError where its loss does not involve the teacher."""
        loss = recipe.loss
        taught = loss.kd_weight > 0 or bool(loss.methods)
        require(taught, "loss.kd_weight=0: is the control `hard`, not a point of the grid; there it must be > 0")
        recipe = replace(recipe, loss=_canonical(loss))
        return self._point("student", None, recipe, self._teacher(recipe).id)

    def _control(self, name: str, recipe: Recipe) -> Point:
        """The point of the same student without its teacher."""
        mass, backend = self._control_smoothing if name == "smoothed" else 0.0, self.base.loss.backend
        loss = LossConfig(temperature=1.0, kd_weight=0.0, ce_weight=1.0, label_smoothing=mass, backend=backend)
        return self._point("control", name, replace(recipe, loss=loss), None)

    def _point(self, role: str, control: str | None, recipe: Recipe, teacher: str | None) -> Point:
        data = self._data(recipe.data)
        files = self._files(role, recipe, data.preprocess)
        identifier = content_hash([role, control, _identity(role, recipe), data.hash, *files])
        return Point(identifier, role, control, recipe, teacher, data.hash)

    def _files(self, role: str, recipe: Recipe, data: Preprocess) -> list[Any]:
        """Hashes of the files that a network and its teacher start from, and the preprocessing of a teacher that takes
        images of its own; [] where there are none. Each file is read once.
        """
        sections = [getattr(recipe, name) for name in SECTIONS[role] if name != "loss"]
        key = json.dumps([asdict(each) for each in (*sections, data)])
        if key not in self._hashes:
            teacher = [] if role == "control" else [checkpoint_hash(recipe), own_preprocess(recipe.teacher, data)]
            self._hashes[key] = [each for each in (weight_files(*sections), *teacher) if each]
        return self._hashes[key]

    def _data(self, config: DataConfig) -> Data:
        """The data set of these settings, loaded once."""
        key = json.dumps(asdict(config))
        if key not in self._data_sets:
            self._data_sets[key] = self._load(config)
        return self._data_sets[key]

    # -- contrasts

    def _contrast(self, contrast: Contrast) -> dict[str, Any]:
        """A contrast as study.json has it. Raises NotInGrid where it compares nothing in the grid."""
        columns = [f"{split}.{name}" for name, metric in METRICS.items() for split in metric.splits]
        hint = did_you_mean(contrast.metric, columns) or f"; must be one of {', '.join(columns)}"
        require(contrast.metric in columns, f"study.contrasts: metric={contrast.metric}: no such metric{hint}")
        entry = {"name": contrast.name or contrast.metric, "metric": contrast.metric}
        pairs = [self._pair(sides, entry["name"]) if sides else None for sides in (contrast, contrast.minus)]
        return {**entry, **(pairs[0] or {}), "minus": pairs[1]}

    def _pair(self, sides: Sides, name: str) -> dict[str, Any]:
        a, b = self._side(sides.a), self._side(sides.b)
        if a["points"] == b["points"]:
            raise NotInGrid(f"study.contrasts: {name}: a and b are the same points; name two settings")
        return {"a": a, "b": b}

    def _side(self, given: Settings) -> dict[str, Any]:
        """One side of a contrast: a point for each seed, of students unless `role` or `control` says otherwise."""
        settings = {key: value for key, value in given.items() if key not in ("control", "role")}
        control, role = given.get("control"), given.get("role", "student")
        require(role in ("student", "teacher"), f"study.contrasts: role={role}: must be student or teacher")
        single = [axis for axis in self.axes.values() if len(axis) == 1]  # whose only value goes without saying
        expanded = {key: value for axis in single for only in axis.values() for key, value in only.items()}
        recipe = self._recipe(expanded | expand(settings, self.axes))
        points = []
        for seeded in (replace(recipe, seed=seed) for seed in self.seeds):
            make = self._teacher if role == "teacher" else self._student
            point = self._control(control, seeded) if control else make(seeded)
            if point.id not in self.points:
                raise NotInGrid(
                    f"study.contrasts: {json.dumps(given)} is not in the grid; every other setting is as in the recipe"
                )
            points.append(point.id)
        return {"settings": dict(given), "points": points}


def _changes_controls(axis: Mapping[Any, Settings]) -> bool:
    """Whether an axis changes anything for a network without a teacher."""
    return any(not key.startswith(("teacher.", "loss.")) for settings in axis.values() for key in settings)


def _canonical(loss: LossConfig) -> LossConfig:
    """The same loss, where settings without an effect have their plainest value, so that equal losses are one point."""
    if loss.student_temperature == loss.temperature:
        loss = replace(loss, student_temperature=None)
    if loss.kd_weight == 0:
        loss = replace(loss, temperature=1.0, student_temperature=None, teacher_smoothing=0.0)
    return replace(loss, label_smoothing=0.0, smoothing="uniform", class_weight=None) if loss.ce_weight == 0 else loss


def _identity(role: str, recipe: Recipe) -> dict[str, Any]:
    """The settings that decide a network of this role."""
    values = identity(recipe)
    values["teacher"].pop("layers", None)
    values["loss"].pop("backend", None)  # every backend gives the same
    if role == "teacher":
        values["data"].pop("omit_class")  # a teacher sees the class all the same
    return {key: values[key] for key in ("seed", "data", "optimizer", "scheduler", "train", *SECTIONS[role])}
