"""``python -m kd.train replay=DIR``: train a finished run again from its recipe, and compare weights and scores."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.config.arguments import read
from kd.config.compose import saved_recipe
from kd.errors import ConfigError
from kd.training.results import largest_difference, origin, read_result
from kd.training.run import STAGES, Run, changes

ARGUMENTS = {"replay": "DIR", "allow_differences": "true", "output": "DIR", "data.root": "PATH"}
NOT_COMPARED = {"command", "system", "seconds"}  # of the provenance: they do not change the weights


def main(words: list[str], run: Callable[..., Run]) -> int:
    """Train a finished run again with `run(recipe, check)` and compare; returns 0 where the two are equal, else 1."""
    given = read(words, ARGUMENTS)
    directory = Path(given["replay"]).resolve()
    old = read_result(directory / "result.json")
    moved = [f"data.root={given['data.root']}"] if "data.root" in given else []
    recipe = saved_recipe(directory / "recipe.yaml", moved)
    old_output = directory.parents[1]
    output = given.get("output", str(old_output / "replays" / f"{recipe.name}-{directory.name}"))
    if Path(output).resolve() == old_output:
        raise ConfigError(f"output={output}: is the old run's, whose teacher would be reused; must be another")

    def check(run: Run) -> None:
        records = (old["provenance"], origin(run))
        differing = changes(*({key: each[key] for key in each.keys() - NOT_COMPARED} for each in records))
        if differing and given.get("allow_differences") != "true":
            raise ConfigError(
                f"replay={given['replay']}: differs in {'; '.join(differing)}; type allow_differences=true to train "
                f"anyway"
            )
        for line in differing:
            run.logger.say(f"differs  {line}")
        if (run.directory / "result.json").exists():
            run.logger.say(f"an earlier replay is found in {run.directory}, its result is compared")

    replayed = run(replace(recipe, output=output, run=directory.name, resume=True), check)
    return report(old, read_result(replayed.directory / "result.json"), replayed.logger.say)


def report(old: dict[str, Any], new: dict[str, Any], say: Callable[[str], None] = print) -> int:
    """Say whether weights and scores are identical, and the largest difference; returns 0 where both are, else 1."""
    before, now = (
        {f"{name}'s sha256": result[name].get("sha256") for name in STAGES if name in result} for result in (old, new)
    )
    changed = changes(before, now)
    say(f"weights  {'; '.join(changed) or 'identical'}")
    gap, worst = largest_difference(old, new)
    say(f"scores   {f'largest difference {gap:.2g} ({worst})' if gap else 'identical'}")
    return int(bool(changed) or gap > 0)
