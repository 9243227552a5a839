"""``python -m kd.evaluate run=DIR``: score a run's weights again and hold the figures against its result.json."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from kd.cli.errors import one_line_errors
from kd.config import compose
from kd.config.arguments import check_target, read
from kd.errors import ConfigError
from kd.training.stored import numbers, read_result

HELP = """usage: python -m kd.evaluate run=DIR [picture=FILE.svg] [data.root=PATH] [data.workers=N]

Loads the networks of a finished run from their files, scores them on validation and test, prints the table, and
compares every figure with DIR/result.json. Exit code 1 when one differs by more than 1e-6, 2 when a file is wrong.
picture=FILE.svg also keeps what was printed as a picture."""

HERE = ("data.root", "data.workers")  # what may be another here than where the run was trained
TOLERANCE = 1e-6  # scores are float64 sums over float32 logits, which vary with the number of threads


def evaluate(folder: Path, picture: str | None, overrides: list[str]) -> int:
    """Print the recomputed table and the largest difference; returns the exit code."""
    from rich.console import Console

    from kd.errors import CheckpointError
    from kd.training import pipeline as stages
    from kd.training import results

    if not folder.is_dir():
        raise ConfigError(f"run={folder}: no such folder; give the folder of a finished run")
    for name in ("recipe.yaml", "result.json"):
        if not (folder / name).is_file() or len(folder.parents) < 2:
            raise ConfigError(f"run={folder}: holds no {name}; give the folder of a finished run, OUTPUT/NAME/RUN")
    stored = read_result(path := folder / "result.json")
    recipe = compose.saved_recipe(folder / "recipe.yaml", overrides)
    recipe.tracker = "none"
    recipe.output = str(folder.parents[1])  # where it is now, with its teachers, not where it was trained
    teacher = folder.parents[1] / "teachers" / Path(stored["teacher"]["weights"]).parent.name
    run = stages.prepare(recipe, folder, teacher)
    scores = results.score(run, results.networks(run))
    was, found = numbers(stored), numbers(scores)
    for name in found:
        if name not in was:
            raise CheckpointError(f"{path}: {name} is missing; give the result of a finished run")
    console = Console(record=True, width=run.logger.console.width)
    results.print_result({key: stored[key] | value for key, value in scores.items()}, console)
    worst, name = max((abs(value - was[name]), name) for name, value in found.items())
    if picture:
        save_picture(console, Path(picture), f"python -m kd.train recipe={recipe.name}")
    print(f"largest difference to result.json: {worst:.2g}{f' ({name})' if worst else ''}")
    return int(worst > TOLERANCE)


def save_picture(console: Any, path: Path, title: str) -> None:
    """What a recording console printed, as an SVG without the fonts that rich would fetch."""
    from rich.console import CONSOLE_SVG_FORMAT

    from kd.checkpoint import write_text

    local = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    write_text(path, console.export_svg(title=title, code_format=local))


def main(arguments: list[str]) -> int:
    """Read the command line and evaluate."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(HELP)
        return 0
    given = read(arguments, {"run": "DIR", "picture": "FILE.svg", **dict.fromkeys(HERE, "VALUE")})
    if "run" not in given:
        raise ConfigError("run: not given; type run=DIR, the directory of a finished run")
    if "picture" in given:
        check_target("picture", Path(given["picture"]), ".svg")
    moved = [f"{name}={given[name]}" for name in HERE if name in given]
    return evaluate(Path(given["run"]).resolve(), given.get("picture"), moved)


if __name__ == "__main__":
    with one_line_errors("kd.evaluate"):
        sys.exit(main(sys.argv[1:]))
