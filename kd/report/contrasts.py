"""The section of a study's declared contrasts: the verdict, statistics and differences of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pandas import DataFrame

from kd.report import figures
from kd.report import formatting as fmt
from kd.report.figures import Effect
from kd.report.page import Card, Figure, Section, Table
from kd.report.statistics import EXACT, Paired, Verdict, bootstrap_coverage, holm, paired, verdict
from kd.report.study import Study

TITLE = "The declared contrasts, and what they show"
SIGNS = {"up": 1, "down": -1, None: 0}


@dataclass(frozen=True)
class Result:
    """A contrast with its paired statistics, Holm's p of the t test and of the sign flips, and its verdict."""

    name: str
    column: str  # the metric that is compared, as a column of the study's table
    contrast: Mapping[str, Any]
    pair: Paired
    holm_t: float | None
    holm_signs: float | None
    verdict: Verdict


def results(study: Study) -> list[Result]:
    """The result of each declared contrast."""
    contrasts = study.card["contrasts"]
    pairs = [paired(study.differences(contrast).tolist()) for contrast in contrasts]
    by_t, by_signs = holm([pair.p_t for pair in pairs]), holm([pair.p_signs for pair in pairs])
    shown = []
    for contrast, pair, t, signs in zip(contrasts, pairs, by_t, by_signs, strict=True):
        name, column = fmt.clean(contrast["name"], 80), contrast["metric"]
        # Neither sign of a difference of differences is better.
        better = 0 if contrast.get("minus") else SIGNS[fmt.metric(column).better]
        shown.append(Result(name, column, contrast, pair, t, signs, verdict(pair, t, better)))
    return shown


def section(study: Study, shown: list[Result]) -> Section:
    """The contrasts as cards, as a forest plot, as a table, and seed by seed."""
    if not shown:
        return Section("Findings", TITLE, [fmt.note("no_contrasts")])
    made = Section("Findings", TITLE, cards=[_card(result) for result in shown])
    effects = [Effect(each.name, each.column, each.verdict.tone, each.pair) for each in shown if each.pair.n]
    if effects:
        made.figures.append(Figure.named("forest", figures.forest(effects)))
    made.tables += [_numbers(study, shown), _by_seed(study, shown)]
    return made


def _card(result: Result) -> Card:
    column, pair = result.column, result.pair
    detail = f"{fmt.metric(column).label}, n = {pair.n}"
    if pair.t_interval:
        detail += f", 95 % t interval {fmt.interval(pair.t_interval, column)}"
    points = " points" if fmt.metric(column).percent and pair.n else ""
    value = f"{fmt.difference(pair.mean, column)}{points}"
    return Card(result.name, value, result.verdict.words, detail, result.verdict.tone)


def _numbers(study: Study, shown: list[Result]) -> Table:
    rows = []
    for result in shown:
        column, pair = result.column, result.pair
        signs = [sum((d > 0) - (d < 0) == sign for d in pair.differences) for sign in (-1, 0, 1)]
        rows.append(
            {
                "contrast": result.name,
                "metric": fmt.label(column),
                "difference": sides(result.contrast),
                "n": f"{pair.n} of {len(study.seeds)}",
                "mean": fmt.difference(pair.mean, column),
                "sd": fmt.difference(pair.sd, column).lstrip("+"),
                "95 % t interval": fmt.interval(pair.t_interval, column),
                "95 % bootstrap": fmt.interval(pair.bootstrap_interval, column),
                "seeds below / at / above 0": " / ".join(map(str, signs)),
                "p, t test": fmt.probability(pair.p_t),
                "Holm’s p (t)": fmt.probability(result.holm_t),
                "p, sign flips": fmt.probability(pair.p_signs),
                "Holm’s p (signs)": fmt.probability(result.holm_signs),
                "what it shows": result.verdict.words,
            }
        )
    return Table("The same in numbers", DataFrame(rows), notes(shown))


def sides(contrast: Mapping[str, Any]) -> str:
    """The difference in words: `teacher ε 0.4 − teacher ε 0 at T 4`."""
    text = _minus(contrast["a"]["settings"], contrast["b"]["settings"])
    other = contrast.get("minus")
    return f"({text}) − ({_minus(other['a']['settings'], other['b']['settings'])})" if other else text


def _minus(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    same = {key: value for key, value in a.items() if key in b and b[key] == value}
    differ = [{key: value for key, value in side.items() if key not in same} for side in (a, b)]
    text = f" {fmt.MINUS} ".join(fmt.settings(side) or "the recipe's own" for side in differ)
    return f"{text} at {fmt.settings(same)}" if same else text


def notes(shown: list[Result]) -> str:
    """The rule of the verdicts, and the limits of intervals and p values from few seeds."""
    lines = [fmt.note("rule", count=len(shown))]
    for n in sorted({result.pair.n for result in shown if result.pair.n > 1}):
        lines.append(fmt.note("coverage", n=n, held=100 * bootstrap_coverage(n)))
        if 2**n <= EXACT:
            lines.append(fmt.note("signs", n=n, p=2 / 2**n))
    return " ".join(lines)


def _by_seed(study: Study, shown: list[Result]) -> Table:
    rows = []
    for result in shown:
        by_seed = study.differences(result.contrast)
        values = {f"seed {seed}": fmt.difference(by_seed.get(seed), result.column) for seed in study.seeds}
        rows.append({"contrast": result.name} | values)
    return Table("Differences seed by seed", DataFrame(rows), folded=True)
