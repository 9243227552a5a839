"""``python -m kd.train recipe=NAME key=value ...``: train a teacher, distil a student, train its control, compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kd import cli
from kd.recipe import Recipe

if TYPE_CHECKING:
    from kd.stages import Run


def run(recipe: Recipe, check: Callable[[Run], None] | None = None) -> int:
    """Run one recipe to its result, once `check` has seen what is prepared; returns the exit code."""
    # Imported here: --help and a wrong command line must not wait for torch.
    from kd import results, stages
    from kd.checkpoint import read_json
    from kd.plan import print_layers, print_plan
    from kd.signals import Interrupted, listen
    from kd.stage import TrainingError

    run = stages.prepare(recipe)
    if recipe.list_layers:
        print_layers(run)
        return 0
    if check:
        check(run)
    stages.rehearse(run)
    if recipe.dry_run:
        print_plan(run)
        return 0
    stages.claim(run)
    listen()
    path = run.folder / "result.json"
    try:
        if path.exists():
            result = read_json(path)
        else:
            stages.execute(run)
            result = results.write_result(run)
        if run.accelerator.is_main_process:
            results.print_result(result, run.journal.console)
            print(path)
    except Interrupted as stop:
        cli.fail(f"{stop}; run the same command to go on", cli.INTERRUPTED)
    except TrainingError as error:
        cli.fail(str(error), 1, everyone=True)
    finally:
        run.accelerator.end_training()
    return 0


if __name__ == "__main__":
    cli.command("kd.train", run)
