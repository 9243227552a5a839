"""``python -m kd.train replay=DIR``: train a finished run again from its recipe, and compare weights and scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kd.config.arguments import read
from kd.config.schema import Recipe, content_hash, identity
from kd.errors import ConfigError
from kd.runtime.provenance import provenance
from kd.text import plain
from kd.training.results import WEIGHTS, read_run, verified
from kd.training.run import STAGES, Run, checkpoint_hash
from kd.training.stored import numbers, read_result

ARGUMENTS = {"replay": "DIR", "allow_differences": "true", "output": "DIR", "data.root": "PATH"}


def main(words: list[str], run: Callable[..., int]) -> int:
    """Train a finished run again with `run(recipe, check)` and compare; returns 0 where the two are equal, else 1."""
    given = read(words, ARGUMENTS)
    if (allow := given.get("allow_differences", "false")) not in ("true", "false"):
        raise ConfigError(f"allow_differences={allow}: must be true or false")
    path = Path(given["replay"]).resolve()
    directory = path.parent if path.name == "result.json" else path
    recipe, result = read_run(directory, [])
    if (hash_now := content_hash(identity(recipe))) != (hash_then := result["provenance"]["recipe_hash"]):
        raise ConfigError(
            f"{directory / 'recipe.yaml'}: is not the recipe of result.json (hash {hash_now}, there {hash_then}); "
            f"restore the file that the run wrote"
        )
    _redirect(recipe, directory, given)
    runs: list[Run] = []

    def check(run: Run) -> None:
        runs.append(run)
        differing = list(differences(result, run))
        if differing and allow == "false":
            raise ConfigError(
                f"replay={given['replay']}: differs in {'; '.join(differing)}; allow_differences=true trains all the "
                f"same"
            )
        for line in differing:
            run.logger.say(plain(f"differs  {line}"))
        if (run.directory / "result.json").exists():
            run.logger.say(f"an earlier replay is found in {run.directory}, its weights are compared")

    if code := run(recipe, check):
        return code
    return report(result, outcome(runs[0]), runs[0].logger.say)


def _redirect(recipe: Recipe, directory: Path, given: dict[str, str]) -> None:
    """Have the recipe train in an output directory of its own: in the old one the old run's teacher would be found."""
    old_output = directory.parents[1]
    recipe.data.root = given.get("data.root", recipe.data.root)
    recipe.output = given.get("output", str(old_output / "replays" / f"{recipe.name}-{directory.name}"))
    if Path(recipe.output).resolve() == old_output:
        raise ConfigError(f"output={recipe.output}: is the old run's, whose teacher would be found there; name another")
    recipe.run, recipe.resume, recipe.dry_run, recipe.list_layers = directory.name, True, False, False


def outcome(run: Run) -> dict[str, Any]:
    """The result of a replay, with the sha256 of the weights that are there now. Raises CheckpointError."""
    result = read_result(run.directory / "result.json")
    for name, sha256 in verified(run, _advice).items():
        result.setdefault(name, {})["sha256"] = sha256
    return result


def _advice(name: str, directory: Path) -> str:
    return f"move {directory if name == 'teacher' else directory.parent} away and it is trained again"


def differences(result: dict[str, Any], run: Run) -> Iterator[str]:
    """What differs from the run of a result, one line each: code, versions, hardware, data, the teacher's file."""
    before, now = result["provenance"], provenance(run.accelerator.num_processes)
    now |= {"data_hash": run.data.hash, "seed": run.recipe.seed, "recipe_hash": content_hash(identity(run.recipe))}
    now["teacher_file"] = checkpoint_hash(run.recipe)
    for key in ("git_sha", "git_dirty", "python", "data_hash", "seed", "recipe_hash", "teacher_file"):
        yield from _differs(key, before.get(key), now[key])
    for section in ("versions", "hardware"):
        for key in now[section]:
            yield from _differs(key, before[section].get(key), now[section][key])


def _differs(name: str, before: Any, now: Any) -> Iterator[str]:
    if before != now:
        yield f"{name}: {plain(str(before), 80)}, now {plain(str(now), 80)}"


def report(old: dict[str, Any], new: dict[str, Any], say: Callable[[str], None] = print) -> int:
    """Say whether weights and scores are identical, and the largest difference; returns 0 where both are, else 1."""
    changed = []
    for name in (name for name in STAGES if name in new):
        before, now = (result.get(name, {}).get("sha256", "not recorded") for result in (old, new))
        changed += _differs(f"{name}'s sha256", before, now)
    say(f"weights  {'; '.join(changed) or 'identical'}")
    before, now = _scores(old), _scores(new)
    gaps = {name: abs(now[name] - before[name]) for name in now.keys() & before.keys()}  # an older kd had fewer metrics
    worst = max(gaps, key=gaps.__getitem__)
    say(f"scores   {f'largest difference {gaps[worst]:.2g} ({worst})' if gaps[worst] else 'identical'}")
    return int(bool(changed) or gaps[worst] > 0)


def _scores(result: dict[str, Any]) -> dict[str, float]:
    scored = {name: result[name] for name in (*STAGES, "difference") if name in result}
    return numbers({name: {w: by[w] for w in WEIGHTS if w in by} for name, by in scored.items()})
