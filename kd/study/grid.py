"""From a study's recipe to its points: the grid spelled out, every distinct network once, and which cell is which.

Nothing here needs torch. A setting is a dotted name, as on the command line.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any

from kd.config import compose
from kd.config.schema import DataConfig, LossConfig, Recipe, content_hash, identity
from kd.config.types import wrong_type
from kd.errors import ConfigError
from kd.study.axes import NotInGrid, Settings, expand, labelled
from kd.study.schema import Contrast, StudyRecipe

MOST = 10_000  # cells times seeds: as many recipes are built and checked before anything is trained
ROUNDING = 1e-12  # of the largest value; four doubles differ by 1e-15 of it, one of a million samples by 1e-6


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
    def settings(self) -> Settings:
        """Everything that decides the point, flat."""
        return flat(_identity(self.role, self.control, self.recipe))


@dataclass
class Plan:
    """A study spelled out: `points` by id, and the rest as the card has it."""

    points: dict[str, Point] = field(default_factory=dict)
    cells: list[dict[str, Any]] = field(default_factory=list)
    controls: list[dict[str, Any]] = field(default_factory=list)
    contrasts: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # contrasts that a narrower grid has no points for


def flat(values: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested settings by dotted name; the methods of a loss stay one value."""
    found: Settings = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping) and key not in ("methods", "model_kwargs")
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def base_recipe(study: StudyRecipe) -> Recipe:
    """The recipe without its study: what every point departs from."""
    return Recipe(**{f.name: getattr(study, f.name) for f in fields(Recipe)})


# ---- points


class Maker:
    """Makes points of a base recipe; equal settings are built once."""

    def __init__(self, base: Recipe, data_hash: Callable[[DataConfig], str]):
        self.base, self.data_hash = base, data_hash
        self._made: dict[str, Recipe] = {}
        self._plain = asdict(base)

    def recipe(self, settings: Settings, seed: int) -> Recipe:
        """The base recipe with these settings: typed, checked."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self._made:
            self._made[key] = _typed(self._plain, settings)
        return replace(self._made[key], seed=seed)

    def teacher(self, recipe: Recipe) -> Point:
        """The point of a recipe's teacher."""
        return self._point("teacher", None, recipe, None)

    def student(self, recipe: Recipe) -> Point:
        """The point of a recipe's student. Raises ConfigError where nothing would come from the teacher."""
        loss = recipe.loss
        if loss.kd_weight == 0 and not loss.methods:
            raise ConfigError("loss.kd_weight=0: is the control `hard`, not a point of the grid; must be > 0 in it")
        recipe = replace(recipe, loss=_canonical(loss))
        return self._point("student", None, recipe, self.teacher(recipe).id)

    def control(self, name: str, recipe: Recipe, label_smoothing: float) -> Point:
        """The same student without its teacher."""
        mass = label_smoothing if name == "smoothed" else 0.0
        loss = replace(
            self.base.loss,
            kd_weight=0.0,
            ce_weight=1.0,
            label_smoothing=mass,
            smoothing="uniform",
            temperature=1.0,
            student_temperature=None,
            teacher_smoothing=0.0,
            methods={},
        )
        return self._point("control", name, replace(recipe, loss=loss), None)

    def _point(self, role: str, control: str | None, recipe: Recipe, teacher: str | None) -> Point:
        data_hash = self.data_hash(recipe.data)
        identifier = content_hash([role, control, _identity(role, control, recipe), data_hash])
        return Point(identifier, role, control, recipe, teacher, data_hash)


def _canonical(loss: LossConfig) -> LossConfig:
    """The same loss, with what makes no difference to it at its plainest."""
    if loss.student_temperature == loss.temperature:
        loss = replace(loss, student_temperature=None)
    if loss.kd_weight == 0:
        loss = replace(loss, temperature=1.0, student_temperature=None, teacher_smoothing=0.0)
    return replace(loss, label_smoothing=0.0, smoothing="uniform") if loss.ce_weight == 0 else loss


@cache
def _schema() -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.structured(Recipe)


def _typed(base: dict[str, Any], settings: Settings) -> Recipe:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = json.loads(json.dumps(base))
    for key, value in settings.items():
        node = values
        *sections, last = key.split(".")
        for section in sections:
            node = node.setdefault(section, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict):
            raise ConfigError(f"{key}={value}: what it belongs to is set to a value of its own; keep one of them")
        node[last] = value
    if isinstance(named := values["loss"]["methods"], dict):
        values["loss"]["methods"] = {k: v for k, v in named.items() if v is not None}
    try:
        return compose.typed(OmegaConf.merge(_schema(), values))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", ""))
        raise ConfigError(wrong_type(key, settings.get(key), str(error).splitlines()[0])) from error


def _identity(role: str, control: str | None, recipe: Recipe) -> dict[str, Any]:
    """The settings that decide a network of this role."""
    values = identity(recipe)
    own = {"teacher": ("teacher",), "student": ("teacher", "student", "loss"), "control": ("student", "loss")}[role]
    found = {name: values[name] for name in ("data", "optimizer", "scheduler", "train", *own)}
    found.get("teacher", {}).pop("layers", None)
    if role == "teacher":
        found["data"] = {k: v for k, v in found["data"].items() if k != "omit_class"}  # which it sees all the same
    found.get("loss", {}).pop("backend", None)  # every backend gives the same
    return {"seed": values["seed"], **found}


# ---- the plan


def plan(
    study: StudyRecipe,
    data_hash: Callable[[DataConfig], str],
    posterior: Callable[[DataConfig], bool],
    narrowed: bool = False,
) -> Plan:
    """Spell a study out. Raises ConfigError for settings that cannot work.

    `posterior` says whether a data set's true posterior is known: without it the control `bayes` cannot be. A contrast
    between points outside the grid is an error too, unless the grid is `narrowed`, another than the recipe's own.
    """
    axes = labelled(study.study.grid)
    maker = Maker(base_recipe(study), data_hash)
    seeds = range(study.seed, study.seed + study.study.seeds)
    made = Plan()
    sizes = [len(values) for values in axes.values()]
    if (cells := math.prod(sizes) * len(seeds)) > MOST:
        times = " x ".join(map(str, [*sizes, len(seeds)]))
        raise ConfigError(f"study.grid: {times} (seeds) are {cells:,} cells; must be ≤ {MOST:,}")
    combinations = list(_combinations(axes))
    for seed in seeds:
        for values, settings in combinations:
            recipe = maker.recipe(settings, seed)
            point = _add(made, maker.student(recipe))
            _add(made, maker.teacher(recipe))
            made.cells.append({"axes": values, "seed": seed, "point": point.id})
            _add_controls(made, maker, study, axes, values, recipe, posterior)
    for contrast in study.study.contrasts:
        try:
            made.contrasts.append(_contrast(made, maker, contrast, axes, seeds))
        except NotInGrid as error:
            if not narrowed:
                raise
            made.left_out.append(f"{contrast.name or contrast.metric}: {error}")
    return made


def _contrast(made: Plan, maker: Maker, contrast: Contrast, axes: Mapping, seeds: range) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": contrast.name or contrast.metric, "metric": contrast.metric}
    for name, settings in (("a", contrast.a), ("b", contrast.b)):
        entry[name] = _side(made, maker, settings, axes, seeds)
    minus = contrast.minus
    both = {"a": minus.a, "b": minus.b} if minus else {}
    entry["minus"] = {name: _side(made, maker, side, axes, seeds) for name, side in both.items()} or None
    for sides in filter(None, (entry, entry["minus"])):
        if sides["a"]["points"] == sides["b"]["points"]:
            raise NotInGrid(f"study.contrasts: {entry['name']}: a and b are the same points; name two settings")
    return entry


def _combinations(axes: Mapping[str, Mapping[Any, Settings]]) -> Iterator[tuple[Settings, Settings]]:
    """Every cell: its value on each axis, and the settings that they stand for, a later axis over an earlier one."""
    for values in itertools.product(*(axis.items() for axis in axes.values())):
        labels = {axis: label for axis, (label, _) in zip(axes, values, strict=True)}
        yield labels, {key: value for _, settings in values for key, value in settings.items()}


def _add(made: Plan, point: Point) -> Point:
    return made.points.setdefault(point.id, point)


def _add_controls(
    made: Plan,
    maker: Maker,
    study: StudyRecipe,
    axes: Mapping[str, Mapping[Any, Settings]],
    values: Settings,
    recipe: Recipe,
    posterior: Callable[[DataConfig], bool],
) -> None:
    for name in study.study.controls:
        if name == "bayes" and not posterior(recipe.data):
            raise ConfigError(
                f"study.controls: bayes needs a data set whose posterior is known, not {recipe.data.name}"
            )
        point = maker.control(name, recipe, study.study.control_smoothing)
        if point.id not in made.points:
            _add(made, point)
            shown = {axis: value for axis, value in values.items() if _matters(axes[axis])}
            made.controls.append({"control": name, "axes": shown, "seed": recipe.seed, "point": point.id})


def _matters(axis: Mapping[Any, Settings]) -> bool:
    """Whether an axis changes anything for a network without a teacher."""
    return any(not key.startswith(("teacher.", "loss.")) for settings in axis.values() for key in settings)


def _side(made: Plan, maker: Maker, settings: Settings, axes: Mapping, seeds: range) -> dict[str, Any]:
    """One side of a contrast, a student's point for each seed; `control: NAME` asks for the control instead."""
    settings = dict(settings)
    control, role = settings.pop("control", None), settings.pop("role", "student")
    if role not in ("student", "teacher"):
        raise ConfigError(f"study.contrasts: role={role}: must be student or teacher; a control is control: NAME")
    expanded: Settings = {}
    for values in axes.values():
        if len(values) == 1:
            (only,) = values.values()
            expanded |= only
    expanded |= expand(settings, axes)
    points = []
    for seed in seeds:
        recipe = maker.recipe(expanded, seed)
        if control:
            point = maker.control(control, recipe, 0.0 if control != "smoothed" else _smoothing(made))
        else:
            point = maker.teacher(recipe) if role == "teacher" else maker.student(recipe)
        if point.id not in made.points:
            known = {**settings, **({"control": control} if control else {})}
            raise NotInGrid(
                f"study.contrasts: {json.dumps(known)} is not in the grid; every other setting is as in the recipe"
            )
        points.append(point.id)
    shown = dict(settings) | ({"control": control} if control else {}) | ({"role": role} if role != "student" else {})
    return {"settings": shown, "points": points}


def _smoothing(made: Plan) -> float:
    return next((p.recipe.loss.label_smoothing for p in made.points.values() if p.control == "smoothed"), 0.1)


def sides_of(contrast: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The two or four sides of a contrast of the card."""
    minus = contrast.get("minus")
    return [contrast["a"], contrast["b"], *((minus["a"], minus["b"]) if minus else ())]


def difference(values: Sequence[float]) -> float:
    """a - b, or (a - b) - (c - d), of one seed's values in the order of `sides_of`, exactly 0 where it is rounding.

    230 - 202 and 272 - 244 right answers are equal; as shares of 300 they differ by 1e-16, which, of one sign in a few
    seeds, a t test takes for an effect.
    """
    found = sum(sign * value for sign, value in zip((1, -1, -1, 1), values, strict=False))
    return 0.0 if abs(found) <= ROUNDING * max(map(abs, values)) else found
