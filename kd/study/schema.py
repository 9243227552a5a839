"""What a study's recipe may set beside a run's: the grid, the seeds, the controls and the contrasts."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kd.config.schema import Checked, Recipe, setting
from kd.errors import ConfigError
from kd.metrics import METRICS

CONTROLS = ("hard", "smoothed", "bayes")
LOSS = "loss"  # the axis whose values are methods, as in `loss=NAME`
FIRST = ("point", "role", "control", "state", "error", "seed", "teacher_point")  # columns of the table


@dataclass
class Sides:
    """Two settings to compare: a minus b. What they do not mention is as in the recipe, or on an axis of one value."""

    a: dict[str, Any] = field(default_factory=dict)
    b: dict[str, Any] = field(default_factory=dict)


@dataclass
class Contrast(Sides):
    """A difference that was declared before anything ran, paired by seed; with `minus` a difference of differences."""

    name: str = ""
    metric: str = "test.top1"
    minus: Sides | None = None

    def __post_init__(self):
        columns = [f"{split}.{name}" for name, metric in METRICS.items() for split in metric.splits]
        if self.metric not in columns:
            near = difflib.get_close_matches(self.metric, columns, n=1)
            hint = f"did you mean {near[0]}?" if near else f"must be one of {', '.join(columns)}"
            raise ConfigError(f"study.contrasts: metric={self.metric}: no such metric; {hint}")


@dataclass
class StudyConfig(Checked):
    """What makes a study of a recipe."""

    section: ClassVar[str] = "study."

    claim: str = setting("", "what the study is to settle, in a sentence")
    paper: str = setting("", "who claimed it")
    seeds: int = setting(5, "how many seeds, from `seed` on; everything is paired by them", ge=1, le=1000)
    engine: str = setting(
        "auto",
        "population: small networks, many at once; runs: a kd.train run each; auto: population where it can",
        among=("auto", "population", "runs"),
    )
    grid: dict[str, Any] = setting({}, "axes: SETTING: [values], loss: [methods], or NAME: {label: {setting: value}}")
    controls: list[str] = setting(["hard"], "students without a teacher: hard, smoothed, bayes (the true posterior)")
    control_smoothing: float = setting(0.1, "label smoothing of the control `smoothed`", gt=0, lt=1)
    contrasts: list[Contrast] = setting([], "declared differences: name, metric, a, b, and minus: {a, b}")

    def __post_init__(self):
        super().__post_init__()
        for name in self.controls:
            if name not in CONTROLS:
                raise ConfigError(f"study.controls={self.controls}: must be some of {', '.join(CONTROLS)}")
        if len(set(self.controls)) < len(self.controls):
            raise ConfigError(f"study.controls={self.controls}: must be different ones")


@dataclass
class StudyRecipe(Recipe):
    """A run's recipe, from which the grid departs, and the study."""

    study: StudyConfig = field(default_factory=StudyConfig)
