"""usage: python -m kd.evaluate run=DIR [picture=FILE.svg] [data.root=PATH] [data.workers=N]
                                 [data.class_order=FILE] [--import FILE.py]

Loads the networks of a finished run from their files, scores them on validation and test, prints the table, and
compares every figure with DIR/result.json. Exit code 1 when one differs by more than 1e-6, 2 when a file is wrong.
picture=FILE.svg also keeps what was printed as a picture. --import FILE.py imports a network of your own.
"""

import re
from pathlib import Path
from typing import Any

from kd.cli.errors import run_command
from kd.config.arguments import imports, read
from kd.config.compose import saved_recipe
from kd.runtime.own_code import import_file

HERE = ("data.root", "data.workers", "data.class_order")  # may differ from where the run was trained
TOLERANCE = 1e-6  # scores are float64 sums over float32 logits, which vary with the number of threads


def evaluate(directory: Path, picture: str | None, words: list[str]) -> int:
    """Print the recomputed table and the largest difference to result.json; returns the exit code."""
    from rich.console import Console

    from kd.training import pipeline, results

    stored = results.read_result(directory / "result.json")
    recipe = saved_recipe(directory / "recipe.yaml", words)
    recipe.tracker = "none"
    recipe.output = str(directory.parents[1])  # where the run and its teacher are now, not where they were trained
    teacher = directory.parents[1] / "teachers" / Path(stored["teacher"]["weights"]).parent.name
    run = pipeline.prepare(recipe, directory, teacher)
    scores = results.score(run, results.load_networks(run))
    console = Console(record=True, width=run.logger.console.width, emoji=False)
    results.print_result({key: stored[key] | value for key, value in scores.items()}, console)
    if picture:
        save_picture(console, Path(picture), f"python -m kd.train recipe={recipe.name}")
    largest, worst = results.largest_difference(stored, scores)
    print(f"largest difference to result.json: {largest:.2g}{f' ({worst})' if largest else ''}")
    return int(largest > TOLERANCE)


def save_picture(console: Any, path: Path, title: str) -> None:
    """Write what a recording console printed, as an SVG without rich's links to fonts on the web."""
    from rich.console import CONSOLE_SVG_FORMAT

    from kd.checkpoint.files import write_text

    local = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    write_text(path, console.export_svg(title=title, code_format=local))


def main(arguments: list[str]) -> int:
    """Read the command line and evaluate."""
    words, files = imports(arguments)
    given = read(words, {"run": "DIR", "picture": "FILE.svg", **dict.fromkeys(HERE, "VALUE")}, required=["run"])
    for path in files:
        import_file(path)
    moved = [f"{name}={given[name]}" for name in HERE if name in given]
    return evaluate(Path(given["run"]).resolve(), given.get("picture"), moved)


if __name__ == "__main__":
    run_command("kd.evaluate", main, __doc__)
