"""``python -m kd.train replay=PATH``: train a finished run again from what it left, and say whether it comes out equal.

The folder, with recipe.yaml and result.json, may be a stranger's: every value is checked before it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd.config import compose
from kd.config.schema import Recipe, content_hash, identity
from kd.errors import ConfigError
from kd.text import plain
from kd.training.stored import numbers, read_result

if TYPE_CHECKING:
    from kd.training.run import Run

WORDS = ("replay", "allow_differences", "output", "data.root")
NETWORKS = ("teacher", "student", "control")


@dataclass
class Past:
    """A finished run: its folder, what it was and what came out."""

    folder: Path
    recipe: Recipe
    result: dict[str, Any]

    @property
    def provenance(self) -> dict[str, Any]:
        """What ran, on what."""
        return self.result["provenance"]


def main(words: list[str], run: Callable[..., int]) -> int:
    """Train the run again with `run(recipe, check)` and compare; returns 0 where it is equal, else 1."""
    given = _given(words)
    past = read(Path(given["replay"]))
    recipe = past.recipe
    recipe.data.root = given.get("data.root", recipe.data.root)
    # A folder of its own, or the old run's teacher would be found instead of trained.
    old_output = past.folder.parents[1]
    recipe.output = given.get("output", str(old_output / "replays" / f"{recipe.name}-{past.folder.name}"))
    if Path(recipe.output).resolve() == old_output:
        raise ConfigError(f"output={recipe.output}: is the old run's, whose teacher would be found there; name another")
    recipe.run, recipe.resume, recipe.dry_run, recipe.list_layers = past.folder.name, True, False, False

    runs: list[Run] = []

    def check(run: Run) -> None:
        runs.append(run)
        found = list(differences(past, run))
        if found and given.get("allow_differences") != "true":
            raise ConfigError(
                f"replay={given['replay']}: differs in {'; '.join(found)}; allow_differences=true trains all the same"
            )
        for line in found:
            run.logger.say(plain(f"differs  {line}"))
        if (run.directory / "result.json").exists():
            run.logger.say(f"an earlier replay is found in {run.directory}, its weights are compared")

    if code := run(recipe, check):
        return code
    return report(past.result, outcome(runs[0]), runs[0].logger.say)


def outcome(run: Run) -> dict[str, Any]:
    """The result of a replay with the sha256 of the weights that are there now. Raises CheckpointError."""
    from kd.training.results import verified

    result = read_result(run.directory / "result.json")
    for name, sha256 in verified(run, _advice).items():
        result.setdefault(name, {})["sha256"] = sha256
    return result


def _advice(name: str, folder: Path) -> str:
    return f"move {folder if name == 'teacher' else folder.parent} away and it is trained again"


def _given(words: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and not value:  # as of a shell variable that is not set
            raise ConfigError(f"{word}: must not be empty")
        if key not in WORDS:
            raise ConfigError(f"{word}: a replay takes the run's own recipe; beside replay= type only "
                              f"{', '.join(f'{name}=' for name in WORDS[1:])}")  # fmt: skip
        if key in given:
            raise ConfigError(f"{word}: is given twice; type one {key}=")
        given[key] = value
    if given.get("allow_differences", "true") not in ("true", "false"):
        raise ConfigError(f"allow_differences={given['allow_differences']}: must be true or false")
    return given


def read(path: Path) -> Past:
    """A finished run from its folder or its result.json.

    Raises ConfigError or CheckpointError, which name what is missing or wrong.
    """
    folder = (path if path.is_dir() else path.parent).resolve()
    if not path.exists() or (path.is_file() and path.name != "result.json"):
        raise ConfigError(f"replay={path}: no such run; give the folder of a finished run, or its result.json")
    for name in ("result.json", "recipe.yaml"):
        if not (folder / name).is_file() or len(folder.parents) < 2:
            raise ConfigError(f"replay={path}: holds no {name}; give the folder of a finished run, OUTPUT/NAME/RUN")
    result = read_result(folder / "result.json")
    recipe = compose.saved_recipe(folder / "recipe.yaml")
    if (is_now := content_hash(identity(recipe))) != (it_was := result["provenance"]["recipe_hash"]):
        raise ConfigError(
            f"{folder / 'recipe.yaml'}: is not the recipe of result.json (hash {is_now}, there "
            f"{it_was}); restore the file that the run wrote"
        )
    return Past(folder, recipe, result)


def differences(past: Past, run: Run) -> Iterator[str]:
    """What is not as it was, one line each: code, versions, hardware, data, the teacher's own weights."""
    from kd.runtime.provenance import provenance
    from kd.training.run import checkpoint_hash

    was, now = past.provenance, provenance(run.accelerator.num_processes)
    now |= {"data_hash": run.data.hash, "seed": run.recipe.seed, "recipe_hash": content_hash(identity(run.recipe))}
    now["teacher_file"] = checkpoint_hash(run.recipe)
    for key in ("git_sha", "git_dirty", "python", "data_hash", "seed", "recipe_hash", "teacher_file"):
        yield from _differs(key, was.get(key), now[key])
    for section in ("versions", "hardware"):
        for key in now[section]:
            yield from _differs(key, was[section].get(key), now[section][key])


def _differs(name: str, was: Any, now: Any) -> Iterator[str]:
    if was != now:
        yield f"{name}: {plain(str(was), 80)}, now {plain(str(now), 80)}"


def report(old: dict[str, Any], new: dict[str, Any], say: Callable[[str], None] = print) -> int:
    """Say whether weights and scores are identical, and the largest difference; returns 0 where both are, else 1."""
    changed = []
    for name in (name for name in NETWORKS if name in new):
        was, now = (side.get(name, {}).get("sha256", "not recorded") for side in (old, new))
        changed += _differs(f"{name}'s sha256", was, now)
    say(f"weights  {'; '.join(changed) or 'identical'}")
    scores, was = _scores(new), _scores(old)
    gaps = {name: abs(value - was[name]) if name in was else math.inf for name, value in scores.items()}
    worst = max(gaps, key=gaps.__getitem__)
    say(f"scores   {f'largest difference {gaps[worst]:.2g} ({worst})' if gaps[worst] else 'identical'}")
    return int(bool(changed) or gaps[worst] > 0)


def _scores(result: dict[str, Any]) -> dict[str, float]:
    scored = {name: result[name] for name in (*NETWORKS, "difference") if isinstance(result.get(name), dict)}
    kept = {name: {which: of[which] for which in ("last", "selected") if which in of} for name, of in scored.items()}
    return numbers(kept)
