"""usage: python -m kd.report study=DIR [output=FILE.html]
       python -m kd.report run=DIR [output=FILE.html]

Writes one HTML page that needs no network, and its tables as Markdown beside it. Trains nothing.
  study=DIR         the directory of a study, finished or not; what each declared contrast shows is printed too
  run=DIR           the directory of a finished run
  output=FILE.html  where the page goes; DIR/report.html if not given

examples: python -m kd.report study=checkpoints/studies/mnist1d_grid
          python -m kd.report run=checkpoints/resnet50_to_18/seed0-1a2b3c4d5e6f
"""

from __future__ import annotations

import sys
from pathlib import Path

from kd.cli.errors import one_line_errors
from kd.config.arguments import check_target, read
from kd.errors import ConfigError

ALLOWED = {"study": "DIR", "run": "DIR", "output": "FILE.html"}


def main(words: list[str]) -> int:
    """Read the command line, write the page, and return the exit code."""
    if {"-h", "--help"} & set(words) or not words:
        print((__doc__ or "").rstrip())
        return 0
    values = read(words, ALLOWED)
    kinds = [kind for kind in ("study", "run") if kind in values]
    if len(kinds) != 1:
        raise ConfigError(f"{' '.join(words)}: give one of study=DIR and run=DIR")
    (kind,) = kinds
    directory = Path(values[kind])
    if not directory.is_dir():
        raise ConfigError(f"{kind}={directory}: no such directory")
    target = Path(values.get("output", directory / "report.html"))
    check_target("output", target, ".html")
    write(kind, directory, target)
    return 0


def write(kind: str, directory: Path, target: Path) -> None:
    """Write the page and its Markdown, and print what a study's contrasts or a run's control show."""
    # Heavy imports wait until the command line is known to be right.
    from kd.checkpoint.files import write_text
    from kd.report import page
    from kd.report.run_page import run_page
    from kd.report.study import Study
    from kd.report.study_page import study_page, summary

    if kind == "run":
        made = run_page(directory)
        print(f"{made.source}\n{made.headline}")
    else:
        study = Study(directory)
        made = study_page(study)
        print(summary(study))
    text = target.with_suffix(".md")
    write_text(target, page.to_html(made))
    write_text(text, page.to_markdown(made))
    print(f"wrote {target} and {text}")


if __name__ == "__main__":
    with one_line_errors("kd.report"):
        sys.exit(main(sys.argv[1:]))
