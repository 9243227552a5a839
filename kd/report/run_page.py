"""The page of a single run: its result, training curves, reliability diagrams and provenance."""

import shlex
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

from kd.report import figures
from kd.report import formatting as fmt
from kd.report.figures import Panel
from kd.report.page import Card, Figure, Page, Section, Table
from kd.report.study_page import facts, origin
from kd.training.dry_run import duration
from kd.training.results import read_result, verdict
from kd.training.run import STAGES

CURVES = {  # columns of metrics.jsonl: a factor and the title of the plot
    "loss": (1, "training loss"),
    "agreement": (100, "agreement with the teacher, training batches, %"),
    "val_top1": (100, "validation accuracy, %"),
    "val_nll": (1, "validation NLL"),
}
Result = dict[str, Any]


def run_page(directory: Path) -> Page:
    """The report of a finished run. Raises CheckpointError for a result.json that kd did not write."""
    result = read_result(directory / "result.json")
    networks = {name: result[name] for name in STAGES if name in result}
    student, teacher = (fmt.clean(result[name]["model"]) for name in ("student", "teacher"))
    _, source, word = verdict(result)
    name = f"{fmt.clean(result.get('recipe'))}: {student} taught by {teacher}, seed {result['provenance'].get('seed')}"
    program, *words = result["provenance"].get("command") or ["train"]
    command = fmt.clean(f"python -m kd.{Path(program).stem} {shlex.join(words)}", 2000)
    sections = [
        outcome(result, networks),
        training(directory, networks),
        reliability(networks),
        provenance(result, networks),
    ]
    headline = word[:1].upper() + word[1:]
    return Page(name, headline, source, command, "", sections, summary=f"{source}\n{headline}")


def outcome(result: Result, networks: dict[str, Result]) -> Section:
    """The paired difference, the agreement, and the scores of every network."""
    made = Section("Result", "What came out")
    if "difference" in result:
        paired = result["difference"]["last"]["test"]
        mean, error = paired["top1"], paired["standard_error"]
        tone, *_ = verdict(result)
        value, words = f"{fmt.difference(mean, 'top1')} points", f"± {100 * error:.2f} standard error"
        made.cards.append(Card("student − control", value, words, fmt.note("paired", n=paired["n"]), tone))
    agreement = f"{100 * result['student']['last']['test']['agreement']:.1f} %"
    made.cards.append(Card("agreement", agreement, "student and teacher predict the same", "on test images", 0))
    made.tables.append(scores(networks))
    return made


def scores(networks: dict[str, Result]) -> Table:
    """A row for each metric that any network has on test, and validation and selected weights by their accuracy."""
    shown = {}
    for name, network in networks.items():
        last = network["last"]
        shown[name] = {
            "test accuracy, selected weights": fmt.number(network["selected"]["test"]["top1"], "top1"),
            "validation accuracy": fmt.number(last["val"]["top1"], "top1"),
        }
        numbers = {metric: value for metric, value in last["test"].items() if isinstance(value, int | float)}
        shown[name] |= {fmt.with_unit(metric): fmt.number(value, metric) for metric, value in numbers.items()}
    frame = DataFrame(shown).fillna(fmt.NOTHING)
    return Table("Scores", frame.rename_axis("metric").reset_index(), fmt.note("scores"))


def training(directory: Path, networks: dict[str, Result]) -> Section:
    """The curves of metrics.jsonl; a teacher's stands beside its weights."""
    made = Section("Training", "Training")
    files = [Path(networks["teacher"]["weights"]).parent / "metrics.jsonl", directory / "metrics.jsonl"]
    logs = [pd.read_json(path, lines=True) for path in dict.fromkeys(files) if path.is_file()]
    log = pd.concat(logs) if logs else DataFrame({"stage": []})
    log = log[log["stage"].isin([*networks])]
    panels = []
    for column, (factor, title) in CURVES.items():
        if column in log and log[column].notna().any():
            own = log.dropna(subset=[column])
            values = {"x": own["update"], "line": own["stage"], "value": factor * own[column]}
            panels.append(Panel(title, DataFrame(values)))
    if panels:
        made.figures.append(Figure.named("curves", figures.lines(panels, "update")))
    return made


def reliability(networks: dict[str, Result]) -> Section:
    """Reliability diagrams of the last weights on test."""
    made = Section("Reliability", "Does each network know how sure it is?")
    bins = {}
    for name, network in networks.items():
        test = network["last"]["test"]
        bins[f"{name}, ECE {100 * test['ece']:.1f} %"] = test.get("reliability")
    if all(bins.values()):  # an older kd did not record them
        made.figures.append(Figure.named("reliability", figures.reliability(bins), whose="the last weights"))
    return made


def provenance(result: Result, networks: dict[str, Result]) -> Section:
    """What each network is, where its weights are, and what the run ran on."""
    cards = {}
    for name, network in networks.items():
        about = {key.replace("_", " "): value for key, value in network.items() if not isinstance(value, dict)}
        cards[name] = about | {"training time": duration(about.pop("seconds"))}
    frame = DataFrame(cards).map(lambda value: fmt.NOTHING if value != value else fmt.clean(value, 120))
    made = Section("Provenance", "Provenance")
    made.tables.append(Table("Networks", frame.rename_axis("").reset_index()))
    made.tables.append(facts("Where the result comes from", origin(result["provenance"]).items()))
    return made
