"""The section that a study is for: the contrasts that were declared before it ran, and what each of them shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.report import figures, words
from kd.report.blocks import Block, Cell, Figure, Finding, Findings, Fold, Section, Table, Text
from kd.report.reading import Study
from kd.report.statistics import EXACT, Paired, Verdict, bootstrap_coverage, holm, paired, verdict

TONES = {1: "positive", -1: "negative", 0: "null"}
Result = tuple[dict[str, Any], Paired, float | None, float | None, Verdict]


def section(study: Study) -> Section:
    """The contrasts as sentences, as a picture, as a table, and seed by seed."""
    found = results(study)
    title = "The declared contrasts, and what they show"
    if not found:
        return Section(
            "contrasts", "Findings", title, [Text("This study declares no contrasts: nothing here is a test.")]
        )
    rows = [(_name(c), c["metric"], pair, v.tone) for c, pair, _, _, v in found]
    blocks: list[Block] = [Findings([_finding(result) for result in found])]
    if any(pair.n for _, pair, *_ in found):
        caption = (
            "Paired differences: dots are seeds, the diamond their mean, the broad bar the 95 % t interval and the "
            "thin line the 95 % bootstrap interval."
        )
        blocks.append(
            Figure(
                "contrasts",
                "Differences and how sure they are",
                figures.forest(rows, "Contrasts with intervals"),
                caption,
            )
        )
    blocks += [_table(study, found), *(Text(line) for line in notes(found)), _by_seed(study, found)]
    return Section("contrasts", "Findings", title, blocks)


def results(study: Study) -> list[Result]:
    """Each contrast with its paired statistics, Holm's p of the t test and of the sign flips, and the verdict."""
    contrasts = study.card["contrasts"]
    pairs = [paired(list(study.differences(contrast).values())) for contrast in contrasts]
    by_t, by_signs = holm([pair.p_t for pair in pairs]), holm([pair.p_signs for pair in pairs])
    found = []
    for contrast, pair, t, signs in zip(contrasts, pairs, by_t, by_signs, strict=True):
        better = 0 if contrast.get("minus") else words.metric(contrast["metric"]).better
        found.append((contrast, pair, t, signs, verdict(pair, t, better)))
    return found


def _name(contrast: Mapping[str, Any]) -> str:
    return words.clean(contrast["name"], 80)


def _units(column: str) -> str:
    return " points" if words.metric(column).percent else ""


def _finding(result: Result) -> Finding:
    contrast, pair, _, _, shows = result
    column = contrast["metric"]
    detail = f"{words.metric(column).label}, n = {pair.n}"
    if pair.t_interval:
        detail += f", 95 % t interval {words.interval(pair.t_interval, column)}"
    value = f"{words.difference(pair.mean, column)}{_units(column) if pair.n else ''}"
    return Finding(_name(contrast), value, shows.words, detail, TONES[shows.tone])


def _table(study: Study, found: list[Result]) -> Table:
    header = ["contrast", "metric", "difference", "n", "mean", "sd", "95 % t interval", "95 % bootstrap"]
    header += [
        "seeds below / at / above 0",
        "p, t test",
        "Holm’s p (t)",
        "p, sign flips",
        "Holm’s p (signs)",
        "what it shows",
    ]
    rows: list[list[str | Cell]] = []
    for contrast, pair, t, signs, shows in found:
        column = contrast["metric"]
        counts = [sum((d > 0) - (d < 0) == sign for d in pair.differences) for sign in (-1, 0, 1)]
        rows.append(
            [
                _name(contrast),
                words.metric(column).label + warning(study, column),
                sides(contrast),
                f"{pair.n} of {len(study.card['seeds'])}",
                words.difference(pair.mean, column),
                words.difference(pair.sd, column).lstrip("+"),
                words.interval(pair.t_interval, column),
                words.interval(pair.bootstrap_interval, column),
                " / ".join(map(str, counts)),
                *map(words.probability, (pair.p_t, t, pair.p_signs, signs)),
                Cell(shows.words, TONES[shows.tone]),
            ]
        )
    note = "Accuracies and other shares in percentage points; paired by seed." if _shares(found) else "Paired by seed."
    return Table("The same in numbers", header, rows, note)


def _shares(found: list[Result]) -> bool:
    return any(words.metric(contrast["metric"]).percent for contrast, *_ in found)


def warning(study: Study, column: str) -> str:
    """A label for a metric that is known to mislead."""
    return " ⚠ misleading alone" if column.rpartition(".")[2] in study.misleading else ""


def sides(contrast: Mapping[str, Any]) -> str:
    """What is subtracted from what: `teacher ε 0.4 − 0 at T 4`."""
    text = _minus(contrast["a"]["settings"], contrast["b"]["settings"])
    if not (other := contrast.get("minus")):
        return text
    return f"({text}) − ({_minus(other['a']['settings'], other['b']['settings'])})"


def _minus(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    same = {key: value for key, value in a.items() if key in b and b[key] == value}
    differ = {key: value for key, value in a.items() if key not in same}
    others = {key: value for key, value in b.items() if key not in same}
    if differ.keys() == others.keys() and len(differ) == 1:
        ((key, value),) = differ.items()
        text = f"{words.setting(key, value)} {words.MINUS} {words.choice(key, others[key])}"
    else:
        text = f"{_all(differ)} {words.MINUS} {_all(others)}"
    role = f" ({words.setting('role', same.pop('role'))})" if "role" in same else ""
    return f"{text} at {_all(same)}{role}" if same else f"{text}{role}"


def _all(settings: Mapping[str, Any]) -> str:
    return ", ".join(words.setting(key, value) for key, value in settings.items()) or "the recipe's own"


def notes(found: list[Result]) -> list[str]:
    """How the words are chosen, and what intervals and p values from so few seeds are worth."""
    sizes = sorted({pair.n for _, pair, *_ in found if pair.n > 1})
    lines = [
        "Rule of the last column: positive or negative where the 95 % t interval of the mean difference excludes 0, "
        f"else not distinguished from 0; “not after correction” where Holm's p over all contrasts ({len(found)}) "
        "is not below 0.05. Not distinguished from 0 does not mean equal: the interval says how large a difference "
        "remains possible."
    ]
    for n in sizes:
        line = (
            f"n = {n}: of 2000 simulated sets of {n} normal differences, the bootstrap interval held the true mean in "
            f"{100 * bootstrap_coverage(n):.1f} % where it should in 95 %; the t interval, exact for normal "
            f"differences, is the one that the words go by. "
        )
        if 2**n <= EXACT:
            smallest = 2 / 2**n
            line += f"The smallest p that sign flips can give is 2/2^{n} = {smallest:.4g}"
            line += ", so alone they can never pass 0.05." if smallest >= 0.05 else "."
        lines.append(line)
    return lines


def _by_seed(study: Study, found: list[Result]) -> Fold:
    header = ["contrast", *(f"seed {seed}" for seed in study.card["seeds"])]
    rows: list[list[str | Cell]] = []
    for contrast, *_ in found:
        d, column = study.differences(contrast), contrast["metric"]
        rows.append([_name(contrast), *(words.difference(d.get(seed), column) for seed in study.card["seeds"])])
    return Fold("Differences seed by seed", [Table("Differences seed by seed", header, rows)])
