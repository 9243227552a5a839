"""``python -m kd.train recipe=NAME key=value ...``: train a teacher, distil a student, train its control, compare."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kd.cli.errors import fail, one_line_errors
from kd.cli.help import help_text
from kd.config import compose
from kd.config.arguments import check_words
from kd.config.schema import Recipe
from kd.config.types import check_kinds
from kd.errors import ConfigError
from kd.runtime import signals

if TYPE_CHECKING:
    from kd.training.run import Run

PROGRAM = "kd.train"


def run(recipe: Recipe, check: Callable[[Run], None] | None = None) -> int:
    """Run one recipe to its result, once `check` has seen what is prepared; returns the exit code."""
    # Imported here: --help and a wrong command line must not wait for torch.
    from kd.errors import TrainingError
    from kd.training import pipeline as stages
    from kd.training import results
    from kd.training.dry_run import print_layers, print_plan
    from kd.training.run import alone_on_run, claim
    from kd.training.stored import read_result

    go_on = signals.GO_ON if recipe.resume else "resume=true goes on, the same command starts again"
    run = stages.prepare(recipe)
    if recipe.list_layers:
        print_layers(run)
        return 0
    if check:
        check(run)
    path = run.directory / "result.json"
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
                    results.print_result(result, run.logger.console)
            elif run.accelerator.is_main_process:
                results.print_result(read_result(path), run.logger.console)
        if run.accelerator.is_main_process:
            print(path)
    except signals.Interrupted as stop:
        if run.accelerator.is_main_process:
            print(f"{stop}; {go_on}", file=sys.stderr)
        raise SystemExit(signals.exit_code()) from stop  # also of several runs, of which the next must not begin
    except KeyboardInterrupt:
        fail(f"stopped; {go_on}", signals.CTRL_C)
    except TrainingError as error:
        fail(str(error), 1)
    except RuntimeError as error:
        if (said := lost(error)) is None:
            raise
        fail(f"{said}; the last saved state is kept, {go_on}", 1, everyone=True)
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


def main(words: list[str], run: Callable[..., int] = run) -> int:
    """Compose the recipe that the command line names, or take that of a run to replay, and run it."""
    if {"-h", "--help"} & set(words):
        print(help_text(PROGRAM))
        return 0
    words = compose.own_methods(words)
    check_words(words)
    if any(word.startswith("replay=") for word in words):
        from kd.training import replay

        return replay.main(words, run)
    for word in words:
        if word.startswith(f"recipe={compose.STUDIES}/"):
            raise ConfigError(f"{word}: is a study; type python -m kd.study {word}")
    import hydra

    def job(config: Any) -> None:
        with one_line_errors(PROGRAM):  # here too: Hydra would print a line of its own
            with compose.explained():
                recipe = compose.typed(config)
            if code := run(recipe):
                raise SystemExit(code)

    words = check_kinds(words)
    compose.register(words)
    spelled = {word: f"loss={','.join(compose.losses(word))}" for word in words if word.startswith("loss=")}
    before = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, instead of printing several lines and exiting
    try:
        sys.argv = [before[0], *(spelled.get(word, word) for word in words)]
        with compose.explained():
            hydra.main(config_path=None, config_name="kd")(job)()
    finally:
        sys.argv = before
    return 0


if __name__ == "__main__":
    signals.listen()  # before the imports that take seconds
    with one_line_errors(PROGRAM):
        sys.exit(main(sys.argv[1:]))
