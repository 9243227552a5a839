"""The section of a study's declared contrasts: the verdict, statistics and differences of each."""

from collections.abc import Mapping
from typing import Any

from pandas import DataFrame

from kd.report import figures
from kd.report import formatting as fmt
from kd.report.page import Card, Figure, Section, Table
from kd.report.statistics import EXACT, Effect, holm, paired, verdict
from kd.report.study import Study
from kd.study.table import differences, sides_of

TITLE = "The declared contrasts, and what they show"
SIGNS = {"up": 1, "down": -1, None: 0}


def effects(study: Study) -> list[Effect]:
    """The effect that each declared contrast shows, in their order."""
    contrasts = study.card["contrasts"]
    pairs = [paired(differences(contrast, study.table)) for contrast in contrasts]
    known = []
    for contrast, pair, p in zip(contrasts, pairs, holm([pair.p_t for pair in pairs]), strict=True):
        name, column = fmt.clean(contrast["name"], 80), contrast["metric"]
        # Neither sign of a difference of differences is better.
        better = 0 if contrast.get("minus") else SIGNS[fmt.metric(column).better]
        known.append(Effect(name, column, pair, *verdict(pair, p, better)))
    return known


def section(study: Study, known: list[Effect]) -> Section:
    """The contrasts as cards, as a forest plot, and as a table."""
    if not known:
        return Section("Findings", TITLE, [fmt.note("no_contrasts")])
    made = Section("Findings", TITLE, cards=[_card(effect) for effect in known])
    drawn = [effect for effect in known if len(effect.pair.differences)]
    if drawn:
        made.figures.append(Figure.named("forest", figures.forest(drawn)))
    made.tables.append(_numbers(study, known))
    return made


def _card(effect: Effect) -> Card:
    column, pair, n = effect.column, effect.pair, len(effect.pair.differences)
    detail = f"{fmt.metric(column).label}, n = {n}"
    if pair.interval:
        detail += f", 95 % t interval {fmt.interval(pair.interval, column)}"
    points = " points" if fmt.metric(column).percent and n else ""
    value = f"{fmt.difference(pair.mean, column)}{points}"
    return Card(effect.name, value, effect.words, detail, effect.tone)


def _numbers(study: Study, known: list[Effect]) -> Table:
    adjusted = holm([effect.pair.p_t for effect in known])
    rows = []
    for contrast, effect, holm_t in zip(study.card["contrasts"], known, adjusted, strict=True):
        name, column, pair, _, words = effect
        signs = [sum((d > 0) - (d < 0) == sign for d in pair.differences) for sign in (-1, 0, 1)]
        rows.append(
            {
                "contrast": name,
                "metric": fmt.label(column),
                "difference": sides(contrast),
                "n": f"{len(pair.differences)} of {len(study.seeds)}",
                "mean": fmt.difference(pair.mean, column),
                "sd": fmt.difference(pair.sd, column).lstrip("+"),
                "95 % t interval": fmt.interval(pair.interval, column),
                "seeds below / at / above 0": " / ".join(map(str, signs)),
                "p, t test": fmt.probability(pair.p_t),
                "Holm’s p": fmt.probability(holm_t),
                "p, sign flips": fmt.probability(pair.p_signs),
                "what it shows": words,
            }
        )
    counts = sorted({len(effect.pair.differences) for effect in known})
    smallest = [fmt.note("signs", n=n, p=2 / 2**n) for n in counts if n > 1 and 2**n <= EXACT]
    notes = [fmt.note("rule", count=len(known)), *smallest]
    return Table("The same in numbers", DataFrame(rows), " ".join(notes))


def sides(contrast: Mapping[str, Any]) -> str:
    """The difference in words: `teacher ε 0.4, T 4 − teacher ε 0, T 4`."""
    a, b, *minus = [fmt.settings(side["settings"]) or "the recipe's own" for side in sides_of(contrast)]
    text = f"{a} {fmt.MINUS} {b}"
    return f"({text}) {fmt.MINUS} ({f' {fmt.MINUS} '.join(minus)})" if minus else text
