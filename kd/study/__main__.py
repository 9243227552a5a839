"""usage: python -m kd.study recipe=studies/NAME [key=value ...]

Trains a grid of teachers and students over several seeds, each network once, and compares them as declared.
The same command resumes: finished points stay, failed ones are tried again.

studies
{studies}

the study
{settings}

Every setting of kd.train may be given too (python -m kd.train --help). Several values make it an axis of the grid:
loss.temperature=1,2,4 teacher.label_smoothing=0,.1,.4; one value fixes it. An axis of the study's own takes its
labels: method=kd,dist. Seeds are study.seeds=N.

  hydra/launcher=NAME  who runs the jobs: joblib (local processes, the default), basic (one after another),
                       submitit_slurm, submitit_local, ray; hydra.launcher.KEY=VALUE sets theirs
  dry_run=true         count the points, estimate the time, write nothing
  --cfg job            print the resolved recipe and stop

Exit code 0 when every point is finished, or when SIGTERM or SIGUSR1 stopped it; 1 when a point has failed; 2 when a
setting or a file is wrong; 130 after Ctrl-C. python -m kd.report study=DIR makes the page.

example: python -m kd.study recipe=studies/mnist1d_grid study.seeds=2 loss.temperature=1,4
"""

import sys
from contextlib import suppress

from kd.cli.errors import one_line_errors
from kd.cli.help import recipe_lines, setting_lines
from kd.runtime import signals
from kd.study.compose import STUDIES, compose
from kd.study.schema import StudyRecipe

PROGRAM = "kd.study"
PATIENCE = 20  # seconds that workers have to save their state


def help_text() -> str:
    """What --help prints."""
    settings = setting_lines(StudyRecipe, "study.")
    return (__doc__ or "").strip().format(studies="\n".join(recipe_lines(STUDIES)), settings="\n".join(settings))


def main(words: list[str]) -> int:
    """Run the study that the command line names; returns the exit code."""
    if {"-h", "--help"} & set(words):
        print(help_text())
        return 0
    if (composed := compose(words)) is None:
        return 0
    from kd.study import driver  # not before: a wrong command line must not wait for torch

    return driver.run(*composed)


def _stop() -> None:
    """Answer SIGTERM and SIGUSR1: stop the workers of this machine too, which save what they can, and leave."""
    if "psutil" in sys.modules:  # imported by accelerate before there are workers; a signal handler should not import
        import psutil

        with suppress(psutil.Error):
            children = psutil.Process().children()
            workers = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
            if loky := sys.modules.get("joblib.externals.loky.process_executor"):
                # As soon as one worker has ended, loky kills all others, also those that are saving.
                loky.kill_process_tree = lambda process: None  # type: ignore[attr-defined]
            for worker in workers:
                worker.terminate()
            for late in psutil.wait_procs(workers, timeout=PATIENCE)[1]:
                late.kill()
            if workers:  # joblib has temporary files to remove
                raise signals.Interrupted("stopped")
    signals.leave()


if __name__ == "__main__":
    signals.listen(*signals.PREEMPTION, leaving=_stop)  # before the imports that take seconds
    with one_line_errors(PROGRAM):
        try:
            sys.exit(main(sys.argv[1:]))
        except signals.Interrupted as stop:  # of a job in this process, or of a worker that was asked alone
            print(f"{stop}; {signals.GO_ON}", file=sys.stderr)
            sys.exit(signals.exit_code())
