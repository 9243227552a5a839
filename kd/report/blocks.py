"""What a report is made of, before it is HTML or Markdown: a page of sections of blocks of plain text."""

from __future__ import annotations

from dataclasses import dataclass, field

TONES = ("", "positive", "negative", "null", "warning")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    tone: str = ""
    kind: str = "text"


@dataclass(frozen=True)
class Code:
    """Text that is read as it stands."""

    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    rows: list[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Cell:
    """A cell of a table that says how it is meant."""

    text: str
    tone: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows. Cells are text or Cell."""

    title: str
    header: list[str]
    rows: list[list[str | Cell]]
    note: str = ""
    kind: str = "table"


@dataclass(frozen=True)
class Finding:
    """One contrast in a sentence."""

    name: str
    value: str
    words: str
    detail: str
    tone: str


@dataclass(frozen=True)
class Findings:
    """What the contrasts show, one beside the other and all alike, whatever they show."""

    items: list[Finding]
    kind: str = "findings"


@dataclass(frozen=True)
class Figure:
    """A drawing: an `svg` element whose text matplotlib has escaped and `drawing.finish` has parsed."""

    name: str  # of its file
    title: str
    svg: str
    caption: str
    kind: str = "figure"


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown on demand."""

    summary: str
    blocks: list[Block]
    kind: str = "fold"


Block = Text | Code | Facts | Table | Findings | Figure | Fold


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it."""

    anchor: str
    short: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """All of a report."""

    title: str
    claim: str
    paper: str
    command: str
    warning: str
    sections: list[Section]
