"""Grid of a study: its cells, the distinct networks (points) that they need, and the points of each contrast."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from kd.config import types
from kd.config.compose import build
from kd.config.schema import DataConfig, LossConfig, Recipe, StudentConfig, TeacherConfig, content_hash, identity
from kd.errors import require
from kd.metrics import METRICS
from kd.study.axes import NotInGrid, Settings, expand, labelled
from kd.study.schema import Contrast, StudyRecipe
from kd.text import did_you_mean

if TYPE_CHECKING:
    from kd.data import Data

ROUNDING = 1e-12  # of the largest value; four doubles differ by 1e-15 of it, one of a million samples by 1e-6
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
    def network(self) -> str:
        """The section of the recipe that the network is built from: teacher or student."""
        return "teacher" if self.role == "teacher" else "student"

    @property
    def section(self) -> TeacherConfig | StudentConfig:
        """That section."""
        return self.recipe.teacher if self.role == "teacher" else self.recipe.student

    @property
    def loss(self) -> LossConfig:
        """What the network minimises."""
        return self.recipe.teacher.own_loss() if self.role == "teacher" else self.recipe.loss

    @property
    def settings(self) -> Settings:
        """Every setting that decides the network, by dotted name."""
        return types.flat(_identity(self.role, self.recipe))


@dataclass
class Plan:
    """A study spelled out: `points` by id, and from `cells` to `contrasts` as study.json has it."""

    points: dict[str, Point] = field(default_factory=dict)
    data: dict[str, Data] = field(default_factory=dict)  # by content hash
    cells: list[dict[str, Any]] = field(default_factory=list)
    controls: list[dict[str, Any]] = field(default_factory=list)
    contrasts: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # contrasts whose points a narrower grid does not have


def base_recipe(study: StudyRecipe) -> Recipe:
    """The recipe from which every point departs, without the section `study`."""
    return Recipe(**{f.name: getattr(study, f.name) for f in fields(Recipe)})


# ---- points


class Maker:
    """Makes the points of a study from its base recipe."""

    def __init__(self, study: StudyRecipe, load: Callable[[DataConfig], Data]):
        self.base, self._load = base_recipe(study), load
        self.control_smoothing = study.study.control_smoothing
        self._recipes: dict[str, Recipe] = {}
        self.data_sets: dict[str, Data] = {}

    def data(self, config: DataConfig) -> Data:
        """The data set of these settings, loaded once."""
        key = json.dumps(asdict(config))
        if key not in self.data_sets:
            self.data_sets[key] = self._load(config)
        return self.data_sets[key]

    def recipe(self, settings: Settings, seed: int) -> Recipe:
        """The base recipe with these settings, checked."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self._recipes:  # building takes milliseconds, and every seed has the same
            self._recipes[key] = build(_nested(asdict(self.base), settings))
        return replace(self._recipes[key], seed=seed)

    def teacher(self, recipe: Recipe) -> Point:
        """The point of a recipe's teacher."""
        return self._point("teacher", None, recipe, None)

    def student(self, recipe: Recipe) -> Point:
        """The point of a recipe's student. Raises ConfigError where its loss does not involve the teacher."""
        loss = recipe.loss
        taught = loss.kd_weight > 0 or bool(loss.methods)
        require(taught, "loss.kd_weight=0: is the control `hard`, not a point of the grid; must be > 0 in it")
        recipe = replace(recipe, loss=_canonical(loss))
        return self._point("student", None, recipe, self.teacher(recipe).id)

    def control(self, name: str, recipe: Recipe) -> Point:
        """The point of the same student without its teacher."""
        mass, backend = self.control_smoothing if name == "smoothed" else 0.0, self.base.loss.backend
        loss = LossConfig(temperature=1.0, kd_weight=0.0, ce_weight=1.0, label_smoothing=mass, backend=backend)
        return self._point("control", name, replace(recipe, loss=loss), None)

    def _point(self, role: str, control: str | None, recipe: Recipe, teacher: str | None) -> Point:
        data_hash = self.data(recipe.data).hash
        identifier = content_hash([role, control, _identity(role, recipe), data_hash])
        return Point(identifier, role, control, recipe, teacher, data_hash)


def _nested(base: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """A recipe's nested values with the settings in their places."""
    values = copy.deepcopy(base)
    for key, value in settings.items():
        *sections, last = key.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = value
    return values


def _canonical(loss: LossConfig) -> LossConfig:
    """The same loss, where settings without an effect have their plainest value, so that equal losses are one point."""
    if loss.student_temperature == loss.temperature:
        loss = replace(loss, student_temperature=None)
    if loss.kd_weight == 0:
        loss = replace(loss, temperature=1.0, student_temperature=None, teacher_smoothing=0.0)
    return replace(loss, label_smoothing=0.0, smoothing="uniform") if loss.ce_weight == 0 else loss


def _identity(role: str, recipe: Recipe) -> dict[str, Any]:
    """The settings that decide a network of this role."""
    values = identity(recipe)
    values["teacher"].pop("layers", None)
    values["loss"].pop("backend", None)  # every backend gives the same
    if role == "teacher":
        values["data"].pop("omit_class")  # a teacher sees the class all the same
    return {key: values[key] for key in ("seed", "data", "optimizer", "scheduler", "train", *SECTIONS[role])}


# ---- the plan


def plan(study: StudyRecipe, load: Callable[[DataConfig], Data], narrowed: bool = False) -> Plan:
    """Spell a study out. Raises ConfigError for settings that cannot work.

    Parameters
    ----------
    study : the study's recipe
    load : loads a data set, of which a point's id has the content hash
    narrowed : whether the grid differs from the recipe's own; a contrast without points is then left out, not an error
    """
    axes = labelled(study.study.grid)
    seeds = range(study.seed, study.seed + study.study.seeds)
    maker, made = Maker(study, load), Plan()
    for seed, (labels, settings) in itertools.product(seeds, list(_combinations(axes))):
        recipe = maker.recipe(settings, seed)
        point = _add(made, maker.student(recipe))
        _add(made, maker.teacher(recipe))
        made.cells.append({"axes": labels, "seed": seed, "point": point.id})
        shared = {axis: label for axis, label in labels.items() if _changes_controls(axes[axis])}
        for name in study.study.controls:
            train = maker.data(recipe.data).train
            known = train.posterior is not None and not train.augments  # of an augmented image it is not known
            require(
                name != "bayes" or known,
                f"study.controls: bayes needs a data set whose posterior is known, not {recipe.data.name}",
            )
            point = maker.control(name, recipe)
            if _add(made, point) is point:
                made.controls.append({"control": name, "axes": shared, "seed": seed, "point": point.id})
    for contrast in study.study.contrasts:
        try:
            made.contrasts.append(_contrast(made, maker, contrast, axes, seeds))
        except NotInGrid as error:
            if not narrowed:
                raise
            made.left_out.append(f"{contrast.name or contrast.metric}: {error}")
    made.data = {data.hash: data for data in maker.data_sets.values()}
    return made


def _combinations(axes: Mapping[str, Mapping[Any, Settings]]) -> Iterator[tuple[Settings, Settings]]:
    """Every cell: its value on each axis, and the settings that they stand for, a later axis over an earlier one."""
    for values in itertools.product(*(axis.items() for axis in axes.values())):
        labels = {axis: label for axis, (label, _) in zip(axes, values, strict=True)}
        yield labels, {key: value for _, settings in values for key, value in settings.items()}


def _add(made: Plan, point: Point) -> Point:
    return made.points.setdefault(point.id, point)


def _changes_controls(axis: Mapping[Any, Settings]) -> bool:
    """Whether an axis changes anything for a network without a teacher."""
    return any(not key.startswith(("teacher.", "loss.")) for settings in axis.values() for key in settings)


# ---- contrasts


def _contrast(made: Plan, maker: Maker, contrast: Contrast, axes: Mapping, seeds: range) -> dict[str, Any]:
    """A contrast as study.json has it. Raises NotInGrid where it compares nothing in the grid."""

    def pair(sides: Any) -> dict[str, Any]:
        a, b = (_side(made, maker, settings, axes, seeds) for settings in (sides.a, sides.b))
        if a["points"] == b["points"]:
            raise NotInGrid(f"study.contrasts: {name}: a and b are the same points; name two settings")
        return {"a": a, "b": b}

    columns = [f"{split}.{name}" for name, metric in METRICS.items() for split in metric.splits]
    hint = did_you_mean(contrast.metric, columns) or f"; must be one of {', '.join(columns)}"
    require(contrast.metric in columns, f"study.contrasts: metric={contrast.metric}: no such metric{hint}")
    name = contrast.name or contrast.metric
    entry = {"name": name, "metric": contrast.metric, **pair(contrast)}
    return entry | {"minus": pair(contrast.minus) if contrast.minus else None}


def _side(made: Plan, maker: Maker, given: Settings, axes: Mapping, seeds: range) -> dict[str, Any]:
    """One side of a contrast: a point for each seed, of students unless `role` or `control` says otherwise."""
    settings = {key: value for key, value in given.items() if key not in ("control", "role")}
    control, role = given.get("control"), given.get("role", "student")
    require(role in ("student", "teacher"), f"study.contrasts: role={role}: must be student or teacher")
    single = [axis for axis in axes.values() if len(axis) == 1]  # whose only value goes without saying
    expanded = {key: value for axis in single for only in axis.values() for key, value in only.items()}
    expanded |= expand(settings, axes)
    points = []
    for seed in seeds:
        recipe = maker.recipe(expanded, seed)
        point = maker.control(control, recipe) if control else getattr(maker, role)(recipe)
        if point.id not in made.points:
            raise NotInGrid(
                f"study.contrasts: {json.dumps(given)} is not in the grid; every other setting is as in the recipe"
            )
        points.append(point.id)
    return {"settings": dict(given), "points": points}


def sides_of(contrast: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The two or four sides of a contrast of study.json."""
    minus = contrast.get("minus")
    return [contrast["a"], contrast["b"], *((minus["a"], minus["b"]) if minus else ())]


def difference(values: Sequence[float]) -> float:
    """a - b, or (a - b) - (c - d), of one seed's values in the order of `sides_of`; exactly 0 where it is rounding.

    Of 300 images, 230 - 202 and 272 - 244 right answers are equal; as accuracies they differ by 1e-16, which a t test
    over a few seeds of one sign takes for an effect.
    """
    total = sum(sign * value for sign, value in zip((1, -1, -1, 1), values, strict=False))
    return 0.0 if abs(total) <= ROUNDING * max(map(abs, values)) else total
