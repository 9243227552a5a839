"""Run of a study: plan, launch the missing jobs, write the table, print the contrasts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from kd.checkpoint.files import write_json
from kd.cli.console import terminal
from kd.config import types
from kd.errors import require
from kd.losses.methods import registry as methods
from kd.metrics import METRICS
from kd.models.preprocess import teacher_preprocess
from kd.runtime.own_code import imported_files
from kd.runtime.provenance import provenance
from kd.study.estimate import seconds_of
from kd.study.folder import SCHEMA, Folder
from kd.study.grid import Plan, base_recipe
from kd.study.jobs import PHASES, Job, jobs
from kd.study.population import why_not
from kd.study.schema import StudyRecipe
from kd.study.table import differences, write_table
from kd.study.train_population import data_of
from kd.study.worker import work
from kd.text import first_line, shown
from kd.training.dry_run import duration
from kd.training.pipeline import network
from kd.training.preflight import check_batch, check_class_weights, check_environment, check_places

if TYPE_CHECKING:
    from pandas import DataFrame

# Hydra's config of a job: it writes nothing of its own, and changes no directory.
JOB = {
    "defaults": ["_self_", {"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}],
    "hydra": {
        "output_subdir": None,
        "run": {"dir": "."},
        "sweep": {"dir": "${study}/jobs/hydra", "subdir": "."},
        "job": {"chdir": False, "name": "kd"},
    },
    "job": "???",
}


def run(study: StudyRecipe, words: Sequence[str]) -> int:
    """Run a study to its table; returns the exit code.

    Parameters
    ----------
    study : the study's recipe
    words : what the command line says to Hydra's launcher
    """
    console = terminal()
    base = base_recipe(study)
    folder = Folder(Path(study.output) / "studies" / study.name)
    check_places(replace(base, run=study.name))
    before = folder.read_card()["points"] if folder.card.exists() else None
    planned = Plan(study, lambda data: data_of(replace(base, data=data)))
    all_jobs = jobs(planned, engines(planned, study.study.engine))
    finished = {point.id for point in planned.points.values() if folder.is_finished(point)}
    pending = [job for job in all_jobs if not finished.issuperset(point.id for point in job.points)]
    used = sorted({job.engine for job in all_jobs})
    roles = Counter(f"{point.role}s" for point in planned.points.values())
    counts = ", ".join(f"{count} {role}" for role, count in sorted(roles.items(), reverse=True))
    parts = f"{len(planned.cells)} cells, {len(planned.contrasts)} contrasts"
    _say(console, f"study    {len(planned.points)} points ({counts}) of {parts}")
    done = f"{len(finished)} points are finished"
    _say(console, f"jobs     {len(all_jobs)} ({', '.join(used)}), {len(pending)} to do; {done}")
    for contrast in planned.left_out:
        _say(console, f"left out {contrast}")
    if study.dry_run:
        _say(console, f"about {duration(sum(map(seconds_of, pending)))} of one core; would write {folder.path}")
        return 0
    with folder.lock():
        if before is not None and set(before) != planned.points.keys():
            _say(console, f"study.json was of another grid, of {len(before)} points; its finished points are kept")
        write_json(folder.card, card(study, planned, used))
        started = time.perf_counter()
        for phase in PHASES:
            _launch([job for job in pending if job.phase == phase], phase, folder, words, console)
        table = write_table(folder.path)
    _say_contrasts(planned.contrasts, table, console)
    for row in table[table["state"] == "failed"].to_dict("records"):
        _say(console, f"failed: {row['role']} {row['point']}: {row['error']}")
    done = int((table["state"] == "finished").sum())
    _say(console, f"{done} of {len(table)} points in {duration(time.perf_counter() - started)}")
    print(folder.table)
    return int(done < len(table))


def _say(console: Console, text: str) -> None:
    console.print(shown(text), soft_wrap=True, highlight=False, markup=False)


def engines(planned: Plan, asked: str) -> dict[str, str]:
    """Which engine trains each point: `population` where it can, else `runs`, a run of its own.

    Raises ConfigError where the recipe asks for an engine that cannot train a point.
    """
    reasons: dict[str, str | None] = {}  # against the population, by what decides it
    chosen = {}
    for point in planned.points.values():
        # Neither the seed nor the teacher's smoothing decides what can be trained, and checking builds a network.
        settings = {k: v for k, v in point.settings.items() if k not in ("seed", "teacher.label_smoothing")}
        kind = json.dumps([point.role, settings], sort_keys=True)
        if kind not in reasons:
            data, members = planned.data[point.data_hash], point.recipe.teacher.members
            require(members == 1, f"teacher.members={members}: must be 1 in a study")
            check_environment(point.recipe)
            check_batch(point.recipe, data, 1)
            check_class_weights(point.recipe, data)
            methods.build(point.recipe.loss.methods)  # a run of its own would fail only when its turn comes
            shown = data.rendered(teacher_preprocess(point.recipe.teacher, data.preprocess))
            own = shown if point.role == "teacher" else data
            reason = why_not(point, network(point.section, point.recipe.seed, own), data.num_classes)
            apart = point.role != "control" and shown is not data
            reasons[kind] = "whose teacher takes images of its own" if apart else reason
        reason = reasons[kind] or ("study.engine=runs" if asked == "runs" else None)
        must = asked == "population" or point.control == "bayes"
        require(
            not (reason and must),
            f"study.engine={asked}: the population cannot train a {point.control or point.role}, {reason}; type "
            f"study.engine=auto, and leave the control bayes out",
        )
        chosen[point.id] = "runs" if reason else "population"
    return chosen


def card(study: StudyRecipe, planned: Plan, used: Sequence[str]) -> dict[str, Any]:
    """The content of study.json; the docstring of `kd.study` says what each entry is."""
    named = {axis: values for axis, values in planned.axes.items() if axis not in types.settings()}
    return {
        "schema": SCHEMA,
        "name": study.name,
        "claim": study.study.claim,
        "paper": study.study.paper,
        "command": " ".join(["python -m kd.study", *sys.argv[1:]]),
        "engine": "+".join(used),
        "recipe": asdict(planned.base),
        "seeds": list(planned.seeds),
        "axes": {axis: list(values) for axis, values in planned.axes.items()},
        "labels": {axis: {str(label): each for label, each in values.items()} for axis, values in named.items()},
        "cells": planned.cells,
        "controls": planned.controls,
        "contrasts": planned.contrasts,
        "points": sorted(planned.points),
        "data": {
            key: {
                "name": data.config.name,
                "class_names": data.class_names,
                **{split: len(getattr(data, split)) for split in ("train", "val", "test")},
                "posterior": data.train.posterior is not None,
            }
            for key, data in planned.data.items()
        },
        "misleading": {name: metric.misleading for name, metric in METRICS.items() if metric.misleading},
        "provenance": provenance(1),
    }


# ---- launching


def _launch(pending: list[Job], phase: str, folder: Folder, words: Sequence[str], console: Console) -> None:
    """Hand the jobs to Hydra's launcher and wait for them."""
    if not pending:
        return
    for job in pending:
        job.write(folder)
    wanted = [folder.point(point.id) for job in pending for point in job.points]
    _say(console, f"{phase:8} {len(wanted)} points")
    before = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what a launcher raises, instead of printing it and exiting
    # A directory is in the job's config, where nothing is parsed but interpolations.
    study, *files = (str(path).replace("${", "\\${") for path in (folder.path.resolve(), *imported_files()))
    ConfigStore.instance().store(name="kd_job", node={**JOB, "study": study, "imports": files}, replace=True)
    try:
        # Hydra's own command line, in its own grammar.
        sys.argv = [before[0], "--multirun", "job=" + ",".join(job.name for job in pending), *words]
        with _progress(wanted, console):
            hydra.main(config_path=None, config_name="kd_job")(work)()
    except Exception as error:  # of a launcher: a worker that was killed, a cluster that went away; points are on disk
        _say(console, f"{phase}: {first_line(error)}")
    finally:
        sys.argv = before


def _progress(wanted: list[Path], console: Console) -> Live:
    """A bar over the points that have been written, by whichever process; nothing where there is no terminal."""
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    task = bar.add_task("", total=len(wanted))

    def now() -> RenderableType:
        bar.update(task, completed=sum(path.exists() for path in wanted))
        return bar.get_renderable()

    return Live(get_renderable=now, console=console, transient=True, refresh_per_second=2)


# ---- results


def _say_contrasts(contrasts: Sequence[Mapping[str, Any]], table: DataFrame, console: Console) -> None:
    """Print mean, standard error over seeds and n of every contrast; the report has intervals and corrections."""
    by_point = table.set_index("point")
    width = max((len(contrast["name"]) for contrast in contrasts), default=0)
    for contrast in contrasts:
        values = differences(contrast, by_point)
        error = f" ± {values.sem():.4f} (standard error, {len(values)} seeds)" if len(values) > 1 else ""
        mean = f"{values.mean():+.4f}" if len(values) else "no seed has every side"
        _say(console, f"{contrast['name']:{width}}  {contrast['metric']}  {mean}{error}")
