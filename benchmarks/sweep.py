"""Every method that compares logits with a teacher's, under one budget: ``python -m benchmarks.sweep``.

Runs `kd.train -m recipe=logit_methods` over the methods and the seeds, in one process; a seed's runs share their
teacher, and finished runs are not run again. Prints, as Markdown, the last weights' scores on the test split: mean ±
standard deviation over the seeds, and the difference to the same student trained on labels alone, seed by seed.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.methods import pure
from kd.config.compose import saved_recipe
from kd.training.results import read_result

ROOT = Path(__file__).parent.parent
CONTROL = "labels alone"
Scores = dict[str, dict[int, dict[str, float]]]  # by method and seed


def commands(names: Sequence[str], seeds: int, more: Sequence[str]) -> list[list[str]]:
    """The control is trained beside plain KD, once a seed."""
    base = ["-m", "recipe=logit_methods", f"seed={','.join(map(str, range(seeds)))}", *more]
    others = ",".join(name for name in names if name != "kd")
    return [[*base, "loss=kd", "control=true"], *([[*base, f"loss={others}"]] if others else [])]


def gather(folder: Path, names: Sequence[str], seeds: int) -> Scores:
    """What the runs in a folder gave on the test split, with their last weights."""
    found: Scores = {name: {} for name in (CONTROL, *names)}
    for path in sorted(folder.glob("*/result.json")):
        recipe, result = saved_recipe(path.with_name("recipe.yaml")), read_result(path)
        name, seed = "+".join(recipe.loss.methods) or "kd", recipe.seed
        if name not in found or seed >= seeds:
            continue
        if seed in found[name]:
            raise SystemExit(
                f"{folder}: two runs of {name} with seed {seed}, of different settings: give another --output"
            )
        found[name][seed] = result["student"]["last"]["test"]
        if "control" in result:
            found[CONTROL][seed] = result["control"]["last"]["test"]
    for name, by_seed in found.items():
        if len(by_seed) < seeds:
            raise SystemExit(f"{folder}: {name} has {len(by_seed)} of {seeds} results")
    return found


def mean_sd(values: Sequence[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(scores: Scores) -> str:
    """In Markdown, in the order of names: a mean over few seeds orders nothing."""
    lines = ["| method | test top-1, % | − labels alone, points | test nll |", "|---|---|---|---|"]
    control = scores[CONTROL]
    for name, by_seed in scores.items():
        top1 = [100 * score["top1"] for score in by_seed.values()]
        nll = [score["nll"] for score in by_seed.values()]
        gain = [100 * (by_seed[seed]["top1"] - control[seed]["top1"]) for seed in by_seed]
        lines.append(
            f"| {name} | {mean_sd(top1, 2)} | {'' if name == CONTROL else mean_sd(gain, 2)} | {mean_sd(nll, 3)} |"
        )
    return "\n".join(lines)


def run(arguments: Sequence[str] | None = None) -> Mapping[str, dict[int, dict[str, float]]]:
    """Train what is missing, print the table, and return the scores."""
    options, more = _options(arguments)
    for words in commands(options.methods, options.seeds, [f"output={options.output}", *more]):
        subprocess.run(
            [sys.executable, "-m", "kd.train", *words], cwd=ROOT, check=True, stdout=2
        )  # progress, apart from the table
    scores = gather(ROOT / options.output / "logit_methods", options.methods, options.seeds)
    typed = shlex.join(["python", "-m", "benchmarks.sweep", *(sys.argv[1:] if arguments is None else arguments)])
    text = f"`{typed}`, torch {torch.__version__}; {options.seeds} seeds, mean ± sd\n\n{table(scores)}"
    print(text)
    return scores


def _options(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.sweep",
        description=__doc__,
        epilog="key=value: a further setting of kd.train, for all runs",
    )
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. N-1, at least 2")
    taught = [name for name, method in pure().items() if "teacher" in method.needs]
    parser.add_argument("--methods", nargs="+", default=taught, metavar="NAME", help="kd is always among them")
    parser.add_argument("--output", default="checkpoints", help="folder of the runs")
    options, more = parser.parse_known_args(arguments)
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds}: must be at least 2, a deviation needs two")
    if wrong := [word for word in more if "=" not in word]:
        parser.error(f"{wrong[0]}: type key=value")
    options.methods = sorted({"kd", *options.methods})
    return options, more


if __name__ == "__main__":
    run()
