"""The page of a report, written as one HTML file that needs no network, and as Markdown without the drawings."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pandas import DataFrame

from kd.report.formatting import TEXTS


@dataclass
class Card:
    """One finding: a value, what it means in words, and details. All look alike but for the colour of the tone."""

    name: str
    value: str
    words: str
    detail: str
    tone: int  # 1 positive, -1 negative, 0 neither


@dataclass
class Figure:
    """A drawing of `kd.report.figures`."""

    title: str
    svg: str
    caption: str

    @classmethod
    def named(cls, name: str, svg: str, **values: Any) -> Figure:
        """A figure with its title and caption from texts.toml."""
        title, caption = (TEXTS["figures"][name][key].format(**values) for key in ("title", "caption"))
        return cls(title[:1].upper() + title[1:], svg, caption)


@dataclass
class Table:
    """A data frame of text, whose first column names the rows. A folded one is shown on demand."""

    title: str
    frame: DataFrame
    note: str = ""
    folded: bool = False


@dataclass
class Section:
    """A heading, and below it notes, cards, figures and tables, in that order."""

    short: str  # in the page's navigation
    title: str
    notes: list[str] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass
class Page:
    """All of a report. The headline is the largest text, `name` is above it, `source` below."""

    name: str
    headline: str
    source: str
    command: str
    warning: str
    sections: list[Section]
    summary: str  # for a terminal


def to_html(page: Page) -> str:
    """The page. Every text is escaped; drawings are not, in which matplotlib has escaped every text."""
    return ENVIRONMENT.get_template("page.html.j2").render(page=page) + "\n"


def to_markdown(page: Page) -> str:
    """The page's text and tables, without its drawings."""
    text = ENVIRONMENT.get_template("page.md.j2").render(page=page)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _markdown(text: Any) -> Markup:
    """Text that stays text in Markdown: no HTML, no emphasis, no link, no end of a table's cell."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    plain = re.sub(r"([\\`*_\[\]#|~$!])", r"\\\1", plain)
    return Markup(re.sub(r"^([-+>]|\d+[.)])(?=\s)", r"\\\1", plain))


ENVIRONMENT = Environment(
    loader=PackageLoader("kd.report", "."),
    autoescape=True,  # whatever the template is called
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters["md"] = _markdown
