"""``python -m kd.train recipe=NAME key=value ...``: train a teacher, distil a student, train its control, compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kd.cli.environment import check_torchrun
from kd.cli.errors import fail, one_line_errors
from kd.cli.help import help_text
from kd.config import arguments, compose
from kd.config.schema import Recipe
from kd.errors import ConfigError
from kd.losses.methods import registry as methods
from kd.runtime import signals

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


def main(words: list[str], run: Callable[..., Any] = run) -> int:
    """Run the recipe that the command line names, several with -m, or replay a run; returns the exit code."""
    if {"-h", "--help"} & set(words):
        print(help_text("all" in words))
        return 0
    try:
        check_torchrun()
    except ConfigError as error:
        fail(str(error), everyone=True)
    settings, options = arguments.options(words)
    if any(word.startswith("replay=") for word in settings):
        from kd.training import replay

        return replay.main(settings, run)
    if study := next((word for word in settings if word.startswith(f"recipe={compose.STUDIES}/")), None):
        raise ConfigError(f"{study}: is a study; type python -m kd.study {study}")
    if options.sweep and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("-m: trains one run after another, which torchrun cannot; type one run at a time")
    for path in options.imports:
        methods.import_own(path)
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
