"""usage: python -m kd.report study=DIR [output=FILE.html]
       python -m kd.report run=DIR [output=FILE.html]

Writes one HTML page that needs no network, and its tables as Markdown beside it. Trains nothing.
  study=DIR         directory of a study, finished or not; the verdict of each declared contrast is printed too
  run=DIR           directory of a finished run
  output=FILE.html  file of the page (default: DIR/report.html)

examples: python -m kd.report study=checkpoints/studies/mnist1d_grid
          python -m kd.report run=checkpoints/resnet50_to_18/seed0-1a2b3c4d5e6f
"""

from pathlib import Path

from kd.cli.errors import run_command
from kd.config.arguments import read
from kd.errors import ConfigError

ALLOWED = {"study": "DIR", "run": "DIR", "output": "FILE.html"}


def main(words: list[str]) -> int:
    """Read the command line, write the page, and return the exit code."""
    values = read(words, ALLOWED)
    kind = "run" if "run" in values else "study"
    if len(values.keys() & {"study", "run"}) != 1:
        raise ConfigError(f"{' '.join(words)}: give one of study=DIR and run=DIR")
    directory = Path(values[kind])
    if not directory.is_dir():
        raise ConfigError(f"{kind}={directory}: no such directory")
    target = Path(values.get("output", directory / "report.html"))

    # Heavy imports wait until the command line is known to be right.
    from kd.checkpoint.files import write_text
    from kd.report.page import to_html, to_markdown
    from kd.report.run_page import run_page
    from kd.report.study import Study
    from kd.report.study_page import study_page

    page = run_page(directory) if kind == "run" else study_page(Study(directory))
    text = target.with_suffix(".md")
    write_text(target, to_html(page))
    write_text(text, to_markdown(page))
    print(f"{page.summary}\nwrote {target} and {text}")
    return 0


if __name__ == "__main__":
    run_command("kd.report", main, __doc__)
