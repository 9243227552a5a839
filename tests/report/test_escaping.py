"""Names that are code elsewhere: on a page and in its Markdown."""

import random
import re

import pytest
from pages import ATTRIBUTES, DRAWN, ELEMENTS, Outline, browsed
from report_folder import EPS, Maker, T

from kd.report.__main__ import main

TAGS = ["script", "img src=x onerror=a()", "svg/onload=a()", "iframe src=//x", "a href=javascript:a()", "style", "base"]
BREAKS = ["", "\"'>", "</td>", "</svg>", "</title>", "-->", "]]>", "\n\n", "|", "`", "[x](javascript:a())", "\x1b[2J"]
BREAKS += ["\ud800", "\u202e", "{{ 7 * 7 }}", "{0}", "$\\frac{1}$", "x" * 10_000]


def hostile(count):
    """That many names, each of its own."""
    rng = random.Random(0)
    return [f"{rng.choice(BREAKS[:-1])}<{rng.choice(TAGS)}>{rng.choice(BREAKS)} {i}" for i in range(count)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of a study in which hundreds of texts are hostile: classes, settings, contrasts, metrics, errors."""
    names = iter(hostile(2000))
    axes = {EPS: [0.0, 0.4], T: [1.0, 4.0], "method": [next(names), next(names)]}
    study = Maker(tmp_path_factory.mktemp("page") / "it", axes=axes, seeds=1, text=lambda name: next(names))
    for _ in range(10):
        study.contrast("any", {"eps": 0.4}, {"eps": 0.0}, metric=f"test.{next(names)}")
    for control in study.controls:
        control["control"] = next(names)
    for point in list(study.points.values())[:6]:
        metric = next(names)
        point["metrics"]["test"][metric] = 0.5
        point["settings"][next(names)] = next(names)
        point["detail"]["smoothing_doubts"] = [next(names)]
        point["provenance"] = point["provenance"] | {"git_sha": next(names), "system": next(names)}
    study.fail(max(study.points), next(names))
    card = study.card()
    card["data"]["ab" * 32]["class_names"] = hostile(100)
    card["recipe"] |= {next(names): {next(names): next(names)} for _ in range(20)}
    study.card = lambda: card
    folder = study.write()
    assert main([f"study={folder}"]) == 0
    return folder


def test_a_hundred_hostile_names_make_no_live_node_on_the_page(page):
    text = (page / "report.html").read_text()
    made = Outline(text)
    assert {tag for tag, _ in made.elements} <= ELEMENTS | DRAWN
    for tag, attributes in made.elements:
        assert attributes.keys() <= ATTRIBUTES, tag
        assert all(attributes.get(name, "#").startswith("#") for name in ("href", "xlink:href"))
        for url in re.findall(r"url\(([^)]*)\)", " ".join(value or "" for value in attributes.values())):
            assert url.startswith("#")
    shown = "".join(made.text)
    assert sum(shown.count(f"<{tag}>") for tag in TAGS) >= 100  # as text
    assert [tag for tag, _ in made.elements].count("section") == 10
    assert "x" * 2001 not in text  # the command's limit; names have far less
    assert not set("\x00\x1b\u202e\r") & set(text)


def test_a_hundred_hostile_names_break_no_row_of_the_markdown(page):
    text = (page / "report.md").read_text()
    made = browsed(text)
    assert {tag for tag, _ in made.elements} <= ELEMENTS | {"strong", "em", "blockquote"}
    assert not any("href" in attributes or "src" in attributes for _, attributes in made.elements)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 6
    for table in tables:
        assert len(browsed(table).rows) == len(table.splitlines()) - 1
    assert "\x1b" not in text
