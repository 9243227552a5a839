"""Names that are code elsewhere: on a terminal, in a spreadsheet, in Markdown, on a page."""

import io
import json
import random
import re

import pytest
import yaml
from conftest import TINY_STUDY
from report_folder import EPS, Maker, T
from rich.console import Console
from test_report import ATTRIBUTES, DRAWN, ELEMENTS, Outline, browsed

from kd.cli import errors
from kd.report import __main__ as report
from kd.training.results import print_result

FORMULAS = [
    "=1+1",
    "+1+cmd",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "=cmd|' /C calc'!A0",
    '=HYPERLINK("http://x")',
]
TAGS = ["script", "img src=x onerror=a()", "svg/onload=a()", "iframe src=//x", "a href=javascript:a()", "style", "base"]
BREAKS = ["", "\"'>", "</td>", "</svg>", "</title>", "-->", "]]>", "\n\n", "|", "`", "[x](javascript:a())", "\x1b[2J"]


def hostile(count):
    """That many names, each of its own."""
    rng = random.Random(0)
    return [
        f"{rng.choice(BREAKS)}<{rng.choice(TAGS)}>{rng.choice(FORMULAS)}{rng.choice(BREAKS)} {i}" for i in range(count)
    ]


# --- a page and its Markdown


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a study in which 100 texts are hostile: classes, recipe, command, contrasts, metrics, jobs."""
    names = iter(hostile(1000))
    study = Maker(
        tmp_path_factory.mktemp("page") / "it", axes={EPS: [0.0, 0.4], T: [1.0]}, seeds=1, text=lambda name: next(names)
    )
    for _ in range(20):
        study.contrast("any", {"eps": 0.4}, {"eps": 0.0}, metric=f"test.{next(names)}")
    for point in list(study.points.values())[:6]:
        for _ in range(5):
            point["settings"][next(names)] = next(names)
        point["detail"]["smoothing_doubts"] = [next(names)]
    card = study.card()
    card["data"]["ab" * 32]["class_names"] = hostile(100)
    card["recipe"] |= {next(names): {next(names): next(names)} for _ in range(20)}
    study.card = lambda: card
    folder = study.write()
    assert report.main([str(folder)]) == 0
    return folder


def test_a_hundred_hostile_names_make_no_live_node_on_the_page(page):
    made = Outline((page / "report.html").read_text())
    assert {tag for tag, _ in made.elements} <= ELEMENTS | DRAWN
    for tag, attributes in made.elements:
        assert attributes.keys() <= ATTRIBUTES, tag
        assert all(attributes.get(name, "#").startswith("#") for name in ("href", "xlink:href"))
    text = "".join(made.text)
    assert sum(text.count(f"<{tag}>") for tag in TAGS) >= 100  # shown, as text


def test_a_hundred_hostile_names_break_no_row_of_the_markdown(page):
    text = (page / "report.md").read_text()
    made = browsed(text)
    assert {tag for tag, _ in made.elements} <= ELEMENTS | {"strong", "em", "blockquote", "h1", "h2"}
    assert not any("href" in attributes or "src" in attributes for _, attributes in made.elements)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len(browsed(table).rows) == len(table.splitlines()) - 1
    assert "\x1b" not in text


# --- a terminal

ODD = "[red]\x1b]0;title\x07\x9b2J[/red]\u202e\ud800"
WRITTEN = r"[red]\x1b]0;title\x07\x9b2J[/red]\u202e\ud800"


def test_an_error_shows_control_characters_and_obeys_none(capsys):
    with pytest.raises(SystemExit):
        errors.fail(f"data.root={ODD}\nsecond line")
    assert capsys.readouterr().err == f"error: data.root={WRITTEN}\\nsecond line\n"


def scores():
    top = {"top1": 0.5, "nll": 1.0, "ece": 0.1, "brier": 0.2, "agreement": 0.5}
    return {"model": ODD, **{which: {"val": top, "test": top} for which in ("last", "selected")}}


def test_the_table_of_a_run_shows_names_as_they_are():
    out = io.StringIO()
    print_result({"teacher": scores(), "student": scores()}, Console(file=out, width=300, force_terminal=True))
    title = re.sub(r"\x1b\[[0-9;]*m|\s", "", out.getvalue())  # without rich's own colours, and wrapped
    assert f"{WRITTEN}teaches{WRITTEN}" in title
    assert "\x1b]0" not in out.getvalue()


def test_the_contrasts_of_a_study_are_shown_as_they_are(kd_study, tiny_study):
    recipe = yaml.safe_load(TINY_STUDY)
    recipe["study"]["contrasts"][0]["name"] = "[bold]x[/bold] =1"  # unprintable text is refused with the recipe
    tiny_study.write_text(f"# @package _global_\n{json.dumps(recipe)}\n")
    done = kd_study("teacher.label_smoothing=0,0.4", "loss.temperature=1,4", "study.seeds=1")
    assert "[bold]x[/bold] =1" in done.out
    assert "\x1b" not in done.out + done.err
