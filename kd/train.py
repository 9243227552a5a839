"""``python -m kd.train recipe=NAME key=value ...``: train a teacher, distil a student, train its control, compare."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from kd.cli import command as cli
from kd.cli import environment as surroundings
from kd.config.schema import Recipe
from kd.runtime import signals

if TYPE_CHECKING:
    from kd.training.pipeline import Run


def run(recipe: Recipe, check: Callable[[Run], None] | None = None) -> int:
    """Run one recipe to its result, once `check` has seen what is prepared; returns the exit code."""
    # Imported here: --help and a wrong command line must not wait for torch.
    from kd.errors import TrainingError
    from kd.runtime.lock import alone_on_run
    from kd.training import pipeline as stages
    from kd.training import results
    from kd.training.dry_run import print_layers, print_plan
    from kd.training.run import check_output, claim

    signals.resumes = recipe.resume
    run = stages.prepare(recipe)
    if recipe.list_layers:
        print_layers(run)
        return 0
    if check:
        check(run)
    path = run.folder / "result.json"
    if not (recipe.resume and path.exists()):
        check_output(recipe.output, write=True)
    try:
        stages.rehearse(run)
        if recipe.dry_run:
            print_plan(run)
            return 0
        signals.check(run.accelerator)
        with alone_on_run(run) as finished:
            claim(run)
            if not finished:
                stages.execute(run)
                result = results.write_result(run)
                if run.accelerator.is_main_process:
                    results.print_result(result, run.journal.console)
            elif run.accelerator.is_main_process:
                results.print_stored(path, run.journal.console)
        if run.accelerator.is_main_process:
            print(path)
    except signals.Interrupted as stop:
        if run.accelerator.is_main_process:
            print(f"{stop}; {signals.go_on()}", file=sys.stderr)
        raise SystemExit(signals.exit_code()) from stop  # also of several runs, of which the next must not begin
    except TrainingError as error:
        cli.fail(str(error), 1)
    except RuntimeError as error:
        if (said := lost(error)) is None:
            raise
        cli.fail(f"{said}; the last saved state is kept, {signals.go_on()}", 1, everyone=True)
    finally:
        run.accelerator.end_training()
    return 0


def lost(error: RuntimeError) -> str | None:
    """What to say where a process that this one needs has ended; None of any other error."""
    text = str(error).strip()
    if "DataLoader worker" in text:
        return f"{text.splitlines()[0].rstrip('. ')}: out of memory, perhaps, or of /dev/shm; data.workers=0 needs none"
    if any(word in text for word in ("Connection closed by peer", "Connection reset by peer", "NCCL")):
        return "another process of this run has ended"
    return None


if __name__ == "__main__":
    surroundings.ready_streams()  # before anything is opened
    signals.listen()  # before the imports that take seconds
    cli.command("kd.train", run)
