"""Settings of a study besides a run's: the grid, the seeds, the controls and the contrasts."""

from dataclasses import dataclass, field
from typing import Any

from kd.config.schema import Checked, Recipe, setting

LOSS = "loss"  # the axis whose values are methods, as in `loss=NAME`
COLUMNS = ("point", "role", "control", "state", "error", "seed", "teacher_point")  # first columns of the table


@dataclass
class Sides:
    """Two settings to compare, a minus b. What they leave out is as in the recipe, or on an axis of one value."""

    a: dict[str, Any] = field(default_factory=dict)
    b: dict[str, Any] = field(default_factory=dict)


@dataclass
class Contrast(Sides):
    """A difference declared before anything runs, paired by seed; with `minus`, a difference of differences."""

    name: str = ""
    metric: str = "test.top1"
    minus: Sides | None = None


@dataclass
class StudyConfig(Checked, section="study."):
    """What makes a study of a recipe."""

    claim: str = setting("", "what the study is to settle, in a sentence")
    paper: str = setting("", "the paper whose claim it is")
    seeds: int = setting(5, "number of seeds, from `seed` on; everything is paired by seed", ge=1, le=1000)
    engine: str = setting(
        "auto",
        "population: small networks, many as one batched model; runs: a kd.train run each; auto: population if it can",
        among=("auto", "population", "runs"),
    )
    grid: dict[str, Any] = setting({}, "axes: SETTING: [values], loss: [methods], or NAME: {label: {setting: value}}")
    controls: list[str] = setting(
        ["hard"],
        "students without a teacher: on labels, on smoothed labels, on the true posterior",
        among=("hard", "smoothed", "bayes"),
    )
    control_smoothing: float = setting(0.1, "label smoothing of the control `smoothed`", gt=0, lt=1)
    contrasts: list[Contrast] = setting([], "declared differences: name, metric, a, b, and minus: {a, b}")


@dataclass
class StudyRecipe(Recipe):
    """The recipe from which the grid departs, and the study."""

    study: StudyConfig = field(default_factory=StudyConfig)
