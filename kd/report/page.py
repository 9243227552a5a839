"""A study's report as HTML and as Markdown: one page of blocks, written out twice."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from kd.report import contrasts, drawing, runs, students, teachers, words
from kd.report.blocks import Block, Cell, Code, Facts, Figure, Findings, Fold, Page, Section, Table, Text
from kd.report.reading import Study


def page(study: Study) -> Page:
    """All of a study's report."""
    card = study.card
    sections = [
        runs.overview(study),
        contrasts.section(study),
        students.section(study),
        teachers.calibration(study),
        teachers.knowledge(study),
        teachers.probe(study),
        teachers.projections(study),
        runs.numbers(study),
        runs.problems(study),
        runs.provenance(study),
    ]
    title, claim, paper = (words.clean(card.get(key) or "", 600) for key in ("name", "claim", "paper"))
    return Page(title, claim, paper, words.clean(card["command"], 2000), runs.incomplete(study), sections)


def figures(sections: list[Section]) -> list[Figure]:
    """Every drawing of a page."""

    def inside(blocks: list[Block]) -> list[Figure]:
        found: list[Figure] = []
        for block in blocks:
            found += [block] if isinstance(block, Figure) else inside(block.blocks) if isinstance(block, Fold) else []
        return found

    return [figure for section in sections for figure in inside(section.blocks)]


# ---- HTML


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("kd.report", "."),
        autoescape=True,  # whatever the template is called
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _is_number(cell: Any) -> bool:
    return bool(re.match(r"[+−<\[]?\s*\d", str(cell)))


def to_html(made: Page) -> str:
    """One file that needs nothing else. Drawings go in as they are (`drawing.finish` parsed them), all else escaped."""
    template = _environment().get_template("page.html.j2")
    light, dark = drawing.palette(False), drawing.palette(True)
    drawn = {"drawing": lambda figure: Markup(figure.svg), "light": light, "dark": dark}
    return template.render(page=made, is_number=_is_number, **drawn) + "\n"


# ---- Markdown


def to_markdown(made: Page, link: Callable[[Figure], str] | None = None) -> str:
    """The same blocks for a repository; drawings by `link`, the address of a drawing's file, else by their caption."""
    lines = [f"# {escape(made.title)}", "", f"**{escape(made.claim)}**", ""]
    lines += [escape(made.paper), ""] if made.paper else []
    lines += [*_fenced(made.command), ""]
    lines += [f"> ⚠ {escape(made.warning)}", ""] if made.warning else []
    for section in made.sections:
        lines += [f"## {escape(section.title)}", ""]
        for block in section.blocks:
            lines += [*_markdown(block, link), ""]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: Any) -> str:
    """Text that stays text in Markdown: no HTML, no emphasis, no link, no end of a table's cell."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    plain = re.sub(r"([\\`*_\[\]#|~$!])", r"\\\1", plain)
    return re.sub(r"^([-+>]|\d+[.)])(?=\s)", r"\\\1", plain)


def _fenced(text: str) -> list[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [fence, text, fence]


def _markdown(block: Block, link: Callable[[Figure], str] | None) -> list[str]:
    match block:
        case Text():
            return [f"> ⚠ {escape(block.text)}" if block.tone == "warning" else escape(block.text)]
        case Code():
            return _fenced(block.text)
        case Facts():
            return [f"- {escape(name)}: {escape(value)}" for name, value in block.rows]
        case Findings():
            return [
                f"- {escape(f.name)}: {escape(f.value)}, **{escape(f.words)}** ({escape(f.detail)})"
                for f in block.items
            ]
        case Figure():
            shown = f"![{escape(block.title)}]({link(block)})" if link else f"*{escape(block.title)}: see the page.*"
            return [shown, "", escape(block.caption)]
        case Table():
            return _table(block)
        case Fold():
            inner = [line for each in block.blocks for line in [*_markdown(each, link), ""]]
            return ["<details>", f"<summary>{escape(block.summary)}</summary>", "", *inner, "</details>"]


def _table(table: Table) -> list[str]:
    def row(cells: list[str | Cell]) -> str:
        return f"| {' | '.join(escape(cell) or ' ' for cell in cells)} |"

    head = [f"**{escape(table.title)}**", "", row([*table.header]), f"|{' --- |' * len(table.header)}"]
    note = ["", escape(table.note)] if table.note else []
    return [*head, *map(row, table.rows), *note]
