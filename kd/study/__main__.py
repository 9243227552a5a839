"""``python -m kd.study recipe=studies/NAME key=value ...``: the command line of studies."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Hashable
from contextlib import suppress
from typing import Any

from kd.cli.errors import one_line_errors
from kd.cli.help import claim
from kd.config import compose as recipes
from kd.config import types as kinds
from kd.config import yaml_reader as strict
from kd.config.arguments import check_words
from kd.config.schema import allowed
from kd.errors import ConfigError
from kd.runtime import signals
from kd.study.axes import check_typed
from kd.study.schema import LOSS, StudyRecipe

PROGRAM, FOLDER = "kd.study", recipes.STUDIES
GROUPS = ("recipe", "data")
# What Hydra takes for its joblib launcher and joblib does not, when there is already something to launch.
LAUNCHER = {"n_jobs": (r"-?0*[1-9]\d*", "a number of processes, -1 for one a core"), "backend": ("loky", "loky")}


def help_text() -> str:
    """What --help prints; nothing is imported for it."""
    lines = [
        f"usage: python -m {PROGRAM} recipe={FOLDER}/NAME [key=value ...]",
        "",
        "Trains a grid of teachers and students over several seeds, each network once, and compares them as declared.",
        "Run it again to go on: what is finished stays, what failed is tried again.",
        "",
        "studies",
        *(f"  {f'{FOLDER}/{name}':28} {claim(path)}" for name, path in recipes.recipe_files(FOLDER).items()),
        "",
        "the study",
    ]
    for name, f in kinds.settings(StudyRecipe).items():
        if name.startswith("study."):
            limits = allowed(f.metadata)
            lines.append(f"  {name:26} {f.metadata['doc']}" + (f" [{limits}]" if limits else ""))
    lines += [
        "",
        *textwrap.wrap(
            "Every setting of kd.train (its --help lists them) may be given too. Several values make it an axis of the "
            "grid, or replace that axis: loss.temperature=1,2,4 teacher.label_smoothing=0,.1,.4 seeds are "
            "study.seeds=N. One value fixes it. An axis of the study's own takes its labels: method=kd,dist.",
            110,
        ),
        "",
        "  hydra/launcher=NAME  who runs the jobs: joblib (local processes, the default), basic (one after another),",
        "                       submitit_slurm, submitit_local, ray; hydra.launcher.KEY=VALUE sets theirs",
        "  dry_run=true         count the points, estimate the time, write nothing",
        "  --cfg job            print the resolved recipe and stop",
        "",
        "Exit code 0 when every point is finished, or SIGTERM or SIGUSR1 stopped it; 1 when a point has failed;",
        "2 when a setting or a file is wrong; 130 after ctrl-C. python -m kd.report FOLDER makes its page.",
        "",
        f"example: python -m {PROGRAM} recipe={FOLDER}/mnist1d_grid study.seeds=2 loss.temperature=1,4",
    ]
    return "\n".join(lines)


def split_words(words: list[str]) -> tuple[list[str], dict[str, list[Any]], list[str]]:
    """The words of a command line: those that Hydra composes, the axes, and those for Hydra's launcher.

    An axis is a setting with several values, or a name that no setting has. Raises ConfigError.
    """
    composed, axes, launched = [], {}, []
    known = kinds.settings(StudyRecipe)
    seen: set[str] = set()
    for word in words:
        key, equals, text = word.partition("=")
        if word.startswith("-"):
            if word.split("=")[0] in ("-m", "--multirun"):
                raise ConfigError(f"{word}: a study is many runs by itself; leave it out")
            composed.append(word)
            continue
        if key in seen:
            raise ConfigError(f"{word}: {key} is given twice; keep one")
        seen.add(key)
        if equals and str(getattr(known.get(key.lstrip("+")), "type", "")).startswith("dict"):
            _check_mapping(word)
        if key.lstrip("+").startswith("hydra"):
            pattern, wanted = LAUNCHER.get(key.rpartition(".")[2], ("", ""))
            if pattern and not re.fullmatch(pattern, text):
                raise ConfigError(f"{word}: must be {wanted}")
            launched.append(word)
        elif key == LOSS and equals:
            axes[key] = recipes.losses(word)
        elif not equals or key in GROUPS or key.startswith("+"):
            composed.append(word)
        elif (several := strict.values(text)) is None and (key not in known or re.match(r"[^\[{'\"].*,", text)):
            raise ConfigError(f"{word}: cannot be read; values are typed A,B, what is no plain word inside quotes")
        elif key in known and len(several or ()) < 2:
            composed.append(word)
        else:
            axes[key] = [_escaped(value) for value in several or ()]
    return composed, axes, launched


def _check_mapping(word: str) -> None:
    """Refuse settings by name that Hydra would merge with the recipe's, which stay. Raises ConfigError."""
    key, _, text = word.lstrip("+").partition("=")
    if key == "study.grid":
        raise ConfigError(
            f"{word}: is not typed; an axis is typed SETTING=A,B, or as NAME=LABEL,LABEL of the recipe's own"
        )
    if re.fullmatch(r"\{\s*\}", text):
        raise ConfigError(f"{word}: changes nothing; type +{key}.NAME=VALUE for each")


def _escaped(value: Any) -> Any:
    """A value in which a reference is each point's own, not the recipe's for all."""
    return re.sub(r"(?<!\\)\$\{", r"\\${", value) if isinstance(value, str) else value


def with_axes(config: Any, axes: dict[str, list[Any]], words: list[str]) -> tuple[Any, bool]:
    """The composed recipe with the grid that the command line asks for, and whether it asks for another."""
    from omegaconf import OmegaConf

    grid = OmegaConf.to_container(config.study.grid)
    assert isinstance(grid, dict)
    for key, values in axes.items():
        if isinstance(own := grid.get(key), dict):
            grid[key] = _labels(key, values, own)
        elif key in kinds.settings() or key == LOSS or key.startswith("loss.methods."):
            grid[key] = values
        elif key in kinds.settings(StudyRecipe):
            raise ConfigError(f"{key}: is no axis; type one value, a list as [A,B]")
        else:
            raise ConfigError(kinds.no_such_setting(key, StudyRecipe))
    fixed = {word.partition("=")[0] for word in words} & grid.keys() - axes.keys()
    for key in fixed:  # one value for what is an axis of the recipe: it is the only one
        grid[key] = [OmegaConf.select(config, key)]
    # Such as loss.teacher_smoothing=${teacher.label_smoothing}: that of each point, not the recipe's for all.
    for key in [key for key in kinds.settings() if key not in grid and _follows(config, key)]:
        grid[key] = [_raw(config, key).replace("${", "\\${")]
    config.study.grid = grid
    return config, bool(axes or fixed)


def _labels(axis: str, values: list[Any], own: dict[Any, Any]) -> dict[Any, Any]:
    """The part of an axis of labels that the command line asks for."""
    found: dict[Any, Any] = {}
    for value in values:
        if not isinstance(value, Hashable) or value not in own:
            raise ConfigError(f"{axis}={value}: must be some of {', '.join(map(str, own))}")
        if value in found:
            raise ConfigError(f"{axis}={value}: is given twice; keep one")
        found[value] = own[value]
    return found


def _follows(config: Any, key: str) -> bool:
    from omegaconf import OmegaConf

    section, _, name = key.rpartition(".")
    node = OmegaConf.select(config, section) if section else config
    return bool(name in node and OmegaConf.is_interpolation(node, name))


def _raw(config: Any, key: str) -> str:
    from omegaconf import OmegaConf

    found: Any = OmegaConf.to_container(config, resolve=False)
    for part in key.split("."):
        found = found[part]
    return found


def compose(words: list[str]) -> tuple[StudyRecipe, list[str], bool] | None:
    """The study that a command line names, the words for the launcher, and whether the grid is not the recipe's own.

    None where Hydra has printed what was asked for, as with --cfg. Raises ConfigError, or what Hydra raises.
    """
    words = recipes.own_methods(words)
    check_words(words)
    composed, axes, launched = split_words(words)
    composed = kinds.check_kinds(composed, StudyRecipe)
    import hydra

    found: list[Any] = []
    recipes.register(composed, StudyRecipe, FOLDER, launcher="joblib")
    before = sys.argv
    try:
        sys.argv = [before[0], *composed, *launched]
        with recipes.explained(StudyRecipe, FOLDER):
            hydra.main(config_path=None, config_name="kd")(found.append)()
    finally:
        sys.argv = before
    if not found:
        return None
    with recipes.explained(StudyRecipe, FOLDER):
        config, narrowed = with_axes(found[0], axes, composed)
        study = recipes.typed(config, StudyRecipe)
    check_typed(study.study.grid, axes.keys(), {word.partition("=")[0].lstrip("+") for word in composed})
    return study, launched, narrowed


def main(words: list[str]) -> int:
    """Compose the study that the command line names and run it."""
    if {"-h", "--help"} & set(words):
        print(help_text())
        return 0
    if (composed := compose(words)) is None:
        return 0
    from kd.study import driver  # not before: a wrong command line must not wait for torch

    return driver.run(*composed)


def _leave() -> None:
    """Asked by a cluster to stop: the jobs of this machine stop too, those that can with their state saved."""
    if "psutil" in sys.modules:  # with accelerate, before there are workers; in a signal nothing should be imported
        import psutil

        with suppress(psutil.Error):
            children = psutil.Process().children()
            workers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
            if loky := sys.modules.get("joblib.externals.loky.process_executor"):
                # It kills all others as soon as one worker has ended, also those that are saving.
                loky.kill_process_tree = lambda process: None  # type: ignore[attr-defined]
            for worker in workers:
                worker.terminate()
            for late in psutil.wait_procs(workers, timeout=20)[1]:
                late.kill()
            if workers:  # joblib has something to put away
                raise signals.Interrupted("stopped")
    signals.leave()


if __name__ == "__main__":
    signals.listen(*signals.PREEMPTION, leaving=_leave)  # before the imports that take seconds
    with one_line_errors(PROGRAM):
        try:
            sys.exit(main(sys.argv[1:]))
        except signals.Interrupted as stop:  # a job in this process, or a worker that was asked alone
            print(f"{stop}; {signals.GO_ON}", file=sys.stderr)
            sys.exit(signals.exit_code())
