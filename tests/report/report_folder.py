"""Makes the folder of a study without training: numbers with known effects, laid out as kd.study says."""

import itertools
import json
from pathlib import Path

import numpy as np

PROVENANCE = {
    "git_sha": "0" * 40,
    "git_dirty": False,
    "python": "3.11",
    "versions": {"torch": "2.14"},
    "hardware": {"cpu": "a cpu", "threads": 1, "gpus": []},
    "system": "Linux",
}
EPS, T, METHOD = "teacher.label_smoothing", "loss.temperature", "method"
DATA = "ab" * 32


class Maker:
    """A study of teachers over eps, students over eps x `axes`, two controls, `seeds` seeds.

    A student's accuracy is 0.6 + effect(axes) + noise of the seed, so that paired differences are known up to `jitter`.
    `text` stands wherever a study has text of its own. `few` leaves out the metrics and details that make drawings.
    """

    def __init__(self, folder: Path, axes=None, seeds=5, effect=lambda axes: 0.0, jitter=0.002, text=None, few=False):
        self.folder, self.effect, self.jitter, self.few = folder, effect, jitter, few
        self.axes = {EPS: [0.0, 0.1, 0.4], T: [1.0, 4.0]} if axes is None else axes
        self.seeds = list(range(seeds))
        self.text = (lambda name: name) if text is None else text
        self.rng = np.random.default_rng(0)
        self.points, self.cells, self.controls, self.contrasts = {}, [], [], []
        self._build()

    def point(self, role, seed, settings, accuracy, teacher=None, control=None):
        name = f"{len(self.points):012x}"
        eps = settings.get(EPS, 0.0)
        test = {"top1": accuracy, "nll": 1.0 - accuracy, "ece": 0.1, "ece_scaled": 0.02, "predictive_kl": 0.3}
        test |= {"nt_kl": 0.5, "nt_cosine": 0.4, "agreement": 0.7, "gamma": 0.4, "brier": None}
        test = {"top1": accuracy, "nll": 1.0 - accuracy, "nt_kl": None} if self.few else test
        found = {"train": self._probe(eps + 0.005), "test": self._probe(eps + 0.2)}
        probe = found if role == "teacher" and not self.few else {"train": {}, "test": {}}
        self.points[name] = {
            "schema": 1,
            "id": name,
            "role": role,
            "control": control,
            "state": "finished",
            "error": None,
            "seed": seed,
            "settings": {"seed": seed, "data.name": self.text("mnist1d"), "student.model": "mlp"} | settings,
            "teacher": teacher,
            "metrics": {
                "train": {"top1": 0.9, "mutual_information": 1.0, "gamma": 0.2} | probe["train"],
                "val": {"top1": 0.6, "post_hoc_temperature": 0.8},
                "test": test | probe["test"],
            },
            "detail": self._detail(role),
            "provenance": PROVENANCE | {"data_hash": DATA, "seconds": 1.5, "job": self.text("job"), "engine": "runs"},
        }
        return name

    def _probe(self, estimate):
        ends = {"smoothing_low": estimate - 0.01, "smoothing_high": estimate + 0.01}
        return {"smoothing_estimate": estimate} | ends

    def _detail(self, role):
        if self.few:
            return {}
        bins = {"count": [10, 0, 30], "confidence": [0.2, None, 0.9], "accuracy": [0.3, None, 0.8]}
        if role != "teacher":
            return {"reliability": bins}
        points = self.rng.normal(size=(30, 2)).round(4).tolist()
        split = {"points": points, "labels": [0, 1, 2] * 10}
        return {
            "reliability": bins,
            "smoothing_doubts": [self.text("few samples")],
            "gamma": {"temperature": [1.0, 2.0, 4.0], "gamma": [0.2, 0.4, 0.7]},
            "projection": {"classes": [0, 1, 2], "templates": [[0, 0]] * 3, "train": split, "test": split},
        }

    def _build(self):
        of_seed = {seed: self.rng.normal(0, 0.02) for seed in self.seeds}
        for seed in self.seeds:
            teachers = {eps: self.point("teacher", seed, {EPS: eps}, 0.8) for eps in self.axes.get(EPS, [0.0])}
            for values in itertools.product(*self.axes.values()):
                axes = dict(zip(self.axes, values, strict=True))
                accuracy = 0.6 + of_seed[seed] + self.effect(axes) + self.rng.normal(0, self.jitter)
                settings = {key: value for key, value in axes.items() if "." in key}
                name = self.point("student", seed, settings, accuracy, teachers[axes.get(EPS, 0.0)])
                self.cells.append({"axes": axes, "seed": seed, "point": name})
            for control in ("hard", "smoothed"):
                name = self.point("control", seed, {}, 0.55, control=control)
                self.controls.append({"control": control, "axes": {}, "seed": seed, "point": name})

    def side(self, **chosen):
        """The students of some values, one for each seed; axes that are not given have their first value."""
        names = {"eps": EPS, "temperature": T, "method": METHOD}
        settings = {names[key]: value for key, value in chosen.items()}
        axes = {axis: settings.get(axis, values[0]) for axis, values in self.axes.items()}
        return {"settings": settings, "points": [c["point"] for c in self.cells if c["axes"] == axes]}

    def contrast(self, name, a, b, minus=None, metric="test.top1"):
        minus = minus and {"a": self.side(**minus[0]), "b": self.side(**minus[1])}
        sides = {"a": self.side(**a), "b": self.side(**b), "minus": minus}
        self.contrasts.append({"name": self.text(name), "metric": metric} | sides)
        return self

    def fail(self, name, error):
        self.points[name] |= {"state": "failed", "error": error, "metrics": {}, "detail": {}}

    def card(self):
        names = [self.text(f"class {i}") for i in range(10)]
        about = {key: self.text(key) for key in ("name", "claim", "paper", "command", "engine")}
        return about | {
            "schema": 1,
            "recipe": {"name": self.text("recipe"), "train": {"batch_size": 10}, "loss": {"methods": {}}},
            "seeds": self.seeds,
            "axes": self.axes,
            "labels": {axis: {v: {} for v in values} for axis, values in self.axes.items() if "." not in axis},
            "cells": self.cells,
            "controls": self.controls,
            "contrasts": self.contrasts,
            "points": sorted(self.points),
            "data": {DATA: {"name": self.text("data"), "class_names": names, "train": 9, "val": 9, "test": 9}},
            "provenance": PROVENANCE,
        }

    def write(self, missing=()):
        (self.folder / "points").mkdir(parents=True)
        (self.folder / "study.json").write_text(json.dumps(self.card()))
        for name, point in self.points.items():
            if name not in missing:
                (self.folder / "points" / f"{name}.json").write_text(json.dumps(point))
        return self.folder
