"""usage: python -m kd.train recipe=NAME [key=value ...]

Trains a teacher, distils a student, trains the same student on labels alone, and compares the two.
The same command resumes a stopped run from its last checkpoint, and prints the result of a finished one.

recipes
{recipes}

data=NAME, a data set with its usual training schedule (the recipe's own settings override it)
{data}

loss=NAME or loss=[A,B], one or more distillation methods; loss=NAME:imagenet takes another preset
{methods}

settings{which}
{settings}

  --cfg job          print the resolved recipe and exit
  -m key=A,B         train a run for each value, one after another
  --import FILE.py   import a method or network of your own; teacher.model=FILE.py:NAME does too
  replay=DIR         train a finished run again and compare weights and scores; with output=DIR,
                     allow_differences=true for other versions, hardware or data

Of a setting that is typed twice the last value counts.

Exit code: 0 finished, or saved after SIGTERM or SIGUSR1; 1 the run cannot continue, or a
replay differs; 2 a setting or a file is wrong; 130 after Ctrl-C.

example: python -m kd.train recipe=resnet50_to_18 loss.temperature=2 seed=1
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kd.cli.errors import fail, one_line_errors
from kd.cli.help import name_lines, recipe_lines, setting_lines
from kd.config import arguments, compose
from kd.config.schema import Recipe
from kd.errors import ConfigError
from kd.losses.methods import registry as methods
from kd.runtime import signals
from kd.runtime.own_code import import_file

if TYPE_CHECKING:
    from kd.training.run import Run

PROGRAM = "kd.train"


def run(recipe: Recipe, check: Callable[[Run], None] | None = None) -> Run:
    """Run one recipe to its result, once `check` has seen what is prepared."""
    # Imported here: --help and a wrong command line must not wait for torch.
    from kd.runtime.lock import locked
    from kd.training import pipeline, results
    from kd.training.dry_run import print_layers, print_plan
    from kd.training.run import claim

    go_on = signals.GO_ON if recipe.resume else "resume=true goes on, the same command starts again"
    run = pipeline.prepare(recipe)
    if recipe.list_layers:
        print_layers(run)
        return run
    if check:
        check(run)
    path = run.directory / "result.json"
    try:
        pipeline.rehearse(run)
        if recipe.dry_run:
            print_plan(run)
            return run
        signals.check(run.accelerator)
        # What is finished is only read, by any number of processes.
        with locked(run.directory, None, lambda: recipe.resume and path.exists(), run.accelerator) as finished:
            claim(run)
            if not finished:
                pipeline.execute(run)
                results.write_result(run)
        if run.accelerator.is_main_process:
            results.print_result(results.read_result(path), run.logger.console)
            print(path)
    except signals.Interrupted as stop:
        if run.accelerator.is_main_process:
            print(f"{stop}; {go_on}", file=sys.stderr)
        raise SystemExit(signals.exit_code()) from stop  # also of several runs, of which the next must not begin
    except KeyboardInterrupt:
        fail(f"stopped; {go_on}", signals.CTRL_C)
    finally:
        run.accelerator.end_training()
    return run


def help_text(everything: bool = False) -> str:
    """What --help prints; `everything` is --help all. Nothing but the recipe files is read for it."""
    return (
        (__doc__ or "")
        .rstrip()
        .format(
            recipes="\n".join(recipe_lines()),
            data=name_lines(compose.recipe_files("data")),
            methods=name_lines(sorted(methods.names())),
            which="" if everything else " (--help all lists the others)",
            settings="\n".join(setting_lines(Recipe, everything=everything)),
        )
    )


def main(words: list[str], run: Callable[..., Any] = run) -> int:
    """Run the recipe that the command line names, several with -m, or replay a run; returns the exit code."""
    if {"-h", "--help"} & set(words):
        print(help_text("all" in words))
        return 0
    settings, options = arguments.options(words)
    for path in options.imports:
        import_file(path)
    if any(word.startswith("replay=") for word in settings):
        from kd.training import replay

        return replay.main(settings, run)
    for word in settings:
        if word.startswith(f"recipe={compose.STUDIES}/"):
            raise ConfigError(f"{word}: is a study; type python -m kd.study {word}")
        if word.startswith(("hydra/", "hydra.")):
            raise ConfigError(f"{word}: launchers are for studies; type python -m kd.study recipe=studies/NAME {word}")
    if options.sweep and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("-m: trains one run after another, which torchrun cannot; type one run at a time")
    configs = [compose.compose(line) for line in (compose.sweep(settings) if options.sweep else [settings])]
    recipes = [compose.typed(config) for config in configs]  # all of them: a wrong one stops before the first trains
    for config, recipe in zip(configs, recipes, strict=True):
        if options.show:
            print(compose.to_yaml(config))
        else:
            run(recipe)
    return 0


if __name__ == "__main__":
    signals.listen()  # before the imports that take seconds
    with one_line_errors(PROGRAM):
        sys.exit(main(sys.argv[1:]))
