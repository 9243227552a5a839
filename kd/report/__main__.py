"""``python -m kd.report DIR``: a study's results as one HTML page and as Markdown."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from kd.cli.errors import one_line_errors
from kd.config.arguments import check_target
from kd.errors import ConfigError

if TYPE_CHECKING:
    from kd.report.blocks import Figure

HELP = """usage: python -m kd.report DIR [html=FILE.html] [markdown=FILE.md] [figures=FOLDER]

Reads the folder of a study, finished or not, and writes DIR/report.html, one page that needs no network, and
DIR/report.md, the same tables. Trains nothing. What each declared contrast shows is printed too.
  html=FILE.html    write the page there instead
  markdown=FILE.md  write the tables there instead
  figures=FOLDER    keep the drawings as files too, and show them in the Markdown

example: python -m kd.report checkpoints/studies/mnist1d_grid"""

FILES = {"html": ".html", "markdown": ".md", "figures": ""}


def report(folder: Path, html: Path, markdown: Path, drawings: Path | None) -> int:
    """Write the report of a study's folder; returns the exit code."""
    from kd.checkpoint.files import write_text
    from kd.report import contrasts, drawing, page, reading, words

    study = reading.read(folder)
    made = page.page(study)
    drawn = {drawings / _file(f): drawing.alone(f.svg) for f in page.figures(made.sections)} if drawings else {}
    near = os.path.relpath(drawings, markdown.parent).replace(os.sep, "/") if drawings else None
    text = page.to_markdown(made, (lambda figure: f"<{near}/{_file(figure)}>") if near else None)
    for path in drawn:
        if os.path.lexists(path) and not path.is_file():
            raise ConfigError(f"figures={drawings}: {path} is there and no file; name another folder")
    for path, content in {**drawn, html: page.to_html(made), markdown: text}.items():
        write_text(path, content)
    print(made.warning or f"{words.clean(study.card['name'])}: {len(study.points)} points, all finished")
    for contrast, pair, *_, shows in contrasts.results(study):
        value = words.difference(pair.mean, contrast["metric"])
        print(f"{words.clean(contrast['name'], 80)}: {value}, n = {pair.n}, {shows.words}")
    print(f"wrote {html} and {markdown}")
    return 0


def _file(figure: Figure) -> str:
    """The name of a drawing's file, in which a stranger's metric is no path."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", figure.name[:200]) + ".svg"


def _check_folder(value: str) -> None:
    """Raise ConfigError where no drawings can be written."""
    word, path = f"figures={value}", Path(value)
    if os.path.lexists(path) and not path.is_dir():
        raise ConfigError(f"{word}: must be a folder; name another")
    if not path.is_dir():
        check_target("figures", path)
    elif not os.access(path, os.W_OK):
        raise ConfigError(f"{word}: cannot be written to; name another folder")


def main(arguments: list[str]) -> int:
    """Read the command line and report."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP)
        return 0
    given = dict(
        argument.split("=", 1) for argument in arguments if "=" in argument and argument.split("=")[0] in FILES
    )
    folders = [argument for argument in arguments if argument.split("=")[0] not in FILES]
    if len(folders) != 1 or len(given) + 1 < len(arguments) or folders[0].startswith("-"):
        raise ConfigError(
            f"{' '.join(arguments)}: type the folder of one study, and html=FILE.html, markdown=FILE.md or "
            f"figures=FOLDER where they should go elsewhere"
        )
    for name, value in given.items():
        if not value or not value.endswith(FILES[name]):
            raise ConfigError(f"{name}={value}: must {f'end in {FILES[name]}' if FILES[name] else 'be a folder'}")
    folder = Path(folders[0])
    html, markdown = (Path(given.get(name, folder / f"report{FILES[name]}")) for name in ("html", "markdown"))
    if "figures" in given:
        _check_folder(given["figures"])
    for name, path in (("html", html), ("markdown", markdown)):
        if name in given or (folder / "study.json").is_file():  # what else there is, the report will say
            check_target(name, path)
    try:
        return report(folder, html, markdown, Path(given["figures"]) if "figures" in given else None)
    except ModuleNotFoundError as error:
        if (error.name or "kd").split(".")[0] == "kd":
            raise
        raise ConfigError(f"kd.report needs {error.name}: pip install 'kd-torch[study]'") from error


if __name__ == "__main__":
    with one_line_errors("kd.report"):
        sys.exit(main(sys.argv[1:]))
