"""What ``python -m kd.study`` does: plan, launch what is missing, gather the table, say what the contrasts are."""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from kd.checkpoint import write_json
from kd.cli.console import terminal
from kd.config.schema import DataConfig, Recipe, content_hash
from kd.config.types import settings as known_settings
from kd.data import Data
from kd.errors import ConfigError
from kd.losses.methods import registry as methods
from kd.metrics import MISLEADING
from kd.runtime.provenance import provenance
from kd.study.axes import labelled
from kd.study.estimate import seconds_of
from kd.study.folder import SCHEMA, Folder
from kd.study.grid import Plan, Point, base_recipe, difference, plan, sides_of
from kd.study.jobs import PHASES, Job, jobs
from kd.study.population import why_not
from kd.study.schema import StudyRecipe
from kd.study.table import write_table
from kd.study.train_population import data_of, network
from kd.study.worker import work
from kd.text import shown
from kd.training.dry_run import duration
from kd.training.preflight import check_batch, check_environment, check_output

INNER = ("points", "teachers", "runs", "jobs", "jobs/hydra")  # the folders of a study


def run(study: StudyRecipe, words: Sequence[str], narrowed: bool = False) -> int:
    """Run a study to its table; `words` are those of the command line that Hydra's launcher is to have.

    `narrowed`: the grid is not the recipe's own, and may lack what its contrasts compare.
    """
    console = terminal()
    folder = Folder(folder_of(study))
    folder.replaced(())  # whose study.json it is, before any work
    sets = _Sets(base_recipe(study))
    planned = plan(study, sets.hash, sets.knows_posterior, narrowed)
    engine = _engines(study, sets)
    all_jobs = jobs(planned, engine)
    pending = [job for job in all_jobs if not all(folder.is_finished(point) for point in job.points)]
    console.print(_summary(planned, all_jobs, pending, folder), soft_wrap=True, highlight=False, markup=False)
    for text in planned.left_out:
        console.print(f"left out {shown(text)}", soft_wrap=True, highlight=False, markup=False)
    if study.dry_run:
        estimate = sum(seconds_of(job) for job in pending)
        console.print(
            f"about {duration(estimate)} of one core; would write {shown(folder.path)}",
            soft_wrap=True,
            markup=False,
        )
        return 0
    with folder.lock("study", wait=False):
        if before := folder.replaced(planned.points):
            console.print(before, soft_wrap=True, highlight=False, markup=False)
        write_json(folder.card, card(study, planned, sets, {engine(point) for point in planned.points.values()}))
        started = time.perf_counter()
        for phase in PHASES:
            _launch([job for job in pending if job.phase == phase], phase, folder, planned, words, console)
        table = write_table(folder.path)
    print_contrasts(planned, folder, console)
    for row in table[table["state"] == "failed"].to_dict("records"):
        text = f"failed: {row['role']} {row['point']}: {shown(row['error'])}"
        console.print(text, soft_wrap=True, markup=False)
    done = int((table["state"] == "finished").sum())
    console.print(f"{done} of {len(table)} points in {duration(time.perf_counter() - started)}")
    print(folder.table)
    return int(done < len(table))


def folder_of(study: StudyRecipe) -> Path:
    """Where a study lives. Raises ConfigError for what would leave the output folder, or cannot be written."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,150}", study.name):
        raise ConfigError(f"name={study.name!r}: must be a plain folder name of letters, digits, '_', '.' and '-'")
    check_output(study.output, write=True)
    folder = Path(study.output) / "studies" / study.name
    key, inner = f"name={study.name}", [folder / each for each in INNER]
    for path in (folder, *inner):
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{key}: {path} is a file; choose another name or output=FOLDER")
    return folder


class _Sets:
    """The data sets of a study, each loaded once."""

    def __init__(self, base: Recipe):
        self.base, self.seen = base, {}

    def data(self, config: DataConfig) -> Data:
        key = content_hash(asdict(config))
        if key not in self.seen:
            self.seen[key] = data_of(replace(self.base, data=config))
        return self.seen[key]

    def hash(self, config: DataConfig) -> str:
        return self.data(config).hash

    def knows_posterior(self, config: DataConfig) -> bool:
        """Whether p* of the training views is known: augmentation makes other views."""
        train = self.data(config).train
        return train.posterior is not None and not train.augments


def _engines(study: StudyRecipe, sets: _Sets) -> Callable[[Point], str]:
    """Which engine trains a point. Raises ConfigError where the recipe asks for one that cannot."""

    @cache
    def reason(role: str, key: str) -> str | None:
        point = known[key]
        data = sets.data(point.recipe.data)
        check_environment(point.recipe)
        check_batch(point.recipe, data, 1)
        if role == "student":
            methods.build(point.recipe.loss.methods)
        return why_not(point.recipe, role, network(point.recipe, role, data), data.num_classes)

    known: dict[str, Point] = {}

    def engine(point: Point) -> str:
        role = "teacher" if point.role == "teacher" else "student"
        settings = {k: v for k, v in point.settings.items() if k not in ("seed", "teacher.label_smoothing")}
        key = json.dumps([role, settings], sort_keys=True)
        known.setdefault(key, point)
        against = reason(role, key) or ("study.engine=runs" if study.study.engine == "runs" else None)
        if study.study.engine == "population" and against:
            raise ConfigError(
                f"study.engine=population: cannot train a {point.role}, {against}; type study.engine=auto"
            )
        if point.control == "bayes" and against:
            raise ConfigError(f"study.controls: bayes needs the population engine, which cannot: {against}")
        return "runs" if against else "population"

    return engine


def card(study: StudyRecipe, planned: Plan, sets: _Sets, engines: set[str]) -> dict[str, Any]:
    """What study.json holds; the package's docstring says what each entry is."""
    axes = labelled(study.study.grid)
    named = {axis: values for axis, values in axes.items() if axis not in known_settings()}
    return {
        "schema": SCHEMA,
        "name": study.name,
        "claim": study.study.claim,
        "paper": study.study.paper,
        "command": " ".join(["python -m kd.study", *sys.argv[1:]]),
        "engine": "+".join(sorted(engines)),
        "recipe": asdict(base_recipe(study)),
        "seeds": list(range(study.seed, study.seed + study.study.seeds)),
        "axes": {axis: list(values) for axis, values in axes.items()},
        "labels": {axis: {str(k): v for k, v in values.items()} for axis, values in named.items()},
        "cells": planned.cells,
        "controls": planned.controls,
        "contrasts": planned.contrasts,
        "points": sorted(planned.points),
        "data": {
            data.hash: {
                "name": data.name,
                "class_names": data.class_names,
                **{split: len(getattr(data, split)) for split in ("train", "val", "test")},
                "posterior": data.train.posterior is not None,
            }
            for data in sets.seen.values()
        },
        "misleading": MISLEADING,
        "provenance": provenance(1),
    }


def _summary(planned: Plan, all_jobs: list[Job], pending: list[Job], folder: Folder) -> str:
    roles = [point.role for point in planned.points.values()]
    counts = ", ".join(f"{roles.count(role)} {role}s" for role in ("teacher", "student", "control") if role in roles)
    done = sum(folder.is_finished(point) for point in planned.points.values())
    engines = {job.engine for job in all_jobs}
    return (
        f"study    {len(planned.points)} points ({counts}) of {len(planned.cells)} cells, {len(planned.contrasts)} "
        f"contrasts\n"
        f"jobs     {len(all_jobs)} ({', '.join(sorted(engines))}), {len(pending)} to do; {done} points are finished"
    )


# ---- launching


def _launch(
    pending: list[Job], phase: str, folder: Folder, planned: Plan, words: Sequence[str], console: Console
) -> None:
    """Hand the jobs to Hydra's launcher and wait; where a person is looking, show how many points are written."""
    if not pending:
        return
    for job in pending:
        job.write(folder)
    wanted = [folder.point(point.id) for job in pending for point in job.points]
    before = sys.argv
    try:
        # Hydra's own command line, in its own grammar; the folder is in the job's config, where nothing is parsed.
        sys.argv = [before[0], "--multirun", "job=" + ",".join(job.name for job in pending), *words]
        with _progress(phase, wanted, console):
            _register_job(folder)
            # Hydra would write through a link.
            (folder.path / "jobs" / "hydra" / "multirun.yaml").unlink(missing_ok=True)
            import hydra

            hydra.main(config_path=None, config_name="kd_job")(work)()
    except Exception as error:  # of a launcher: a worker that was killed, a cluster that went away; points are on disk
        if type(error).__module__.partition(".")[0] in ("hydra", "omegaconf"):
            raise
        text = str(error).strip().splitlines()
        console.print(
            f"{phase}: {type(error).__name__}: {shown(text[0]) if text else ''}", soft_wrap=True, markup=False
        )
    finally:
        sys.argv = before


def _register_job(folder: Folder) -> None:
    from hydra.core.config_store import ConfigStore

    quiet = [{"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}]
    defaults = ["_self_", {"override hydra/launcher": "joblib"}, *quiet]
    sweep = {"dir": _plain(folder.path / "jobs" / "hydra"), "subdir": "."}
    places = {"output_subdir": None, "run": {"dir": "."}, "sweep": sweep, "job": {"chdir": False, "name": "kd"}}
    node = {"defaults": defaults, "hydra": places, "study": _plain(folder.path.resolve()), "job": "???"}
    ConfigStore.instance().store(name="kd_job", node=node, replace=True)


def _plain(path: Path) -> str:
    return str(path).replace("${", "\\${")  # no interpolation


@contextmanager
def _progress(phase: str, wanted: list[Path], console: Console) -> Iterator[None]:
    """A bar over the points that have been written, whoever writes them."""
    if not console.is_terminal:
        console.print(f"{phase:8} {len(wanted)} points", soft_wrap=True)
        yield
        return
    stop = threading.Event()
    columns = (TextColumn(f"{phase:8}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(phase, total=len(wanted))

        def watch() -> None:
            while not stop.wait(0.5):
                bar.update(task, completed=sum(path.exists() for path in wanted))

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


# ---- what came out


def print_contrasts(planned: Plan, folder: Folder, console: Console) -> None:
    """Every declared contrast: mean, standard error over seeds, n. Intervals and corrections are the report's."""
    table = Table(title="contrasts, paired by seed", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "metric", "difference", "± SE", "n"):
        table.add_column(column, justify="left" if column in ("", "metric") else "right")
    for contrast in planned.contrasts:
        values = differences(contrast, folder)
        mean, error = mean_and_error(values)
        numbers = [f"{mean:+.4f}" if values else "-", f"{error:.4f}" if len(values) > 1 else "-"]
        table.add_row(*(escape(shown(contrast[key])) for key in ("name", "metric")), *numbers, str(len(values)))
    if planned.contrasts:
        console.print(table)


def differences(contrast: dict[str, Any], folder: Folder) -> list[float]:
    """One paired difference for each seed of which all sides are finished."""
    split, _, name = contrast["metric"].partition(".")
    found = []
    for ids in zip(*(side["points"] for side in sides_of(contrast)), strict=True):
        points = [folder.found(identifier) for identifier in ids]
        values = [(p or {"metrics": {}})["metrics"].get(split, {}).get(name) for p in points]
        if all(value is not None for value in values):
            found.append(difference(values))
    return found


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of it; nan where there are too few."""
    if not values:
        return math.nan, math.nan
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
