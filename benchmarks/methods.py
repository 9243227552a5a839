"""Forward and backward of every method that looks at logits and labels only, as multiples of plain KD in plain PyTorch.

Medians over interleaved rounds, 1024 examples of 1000 classes unless `--shape` says otherwise. Plain KD is
``T² kl_div(log_softmax(s/T), softmax(t/T))``; a method is called as the loop calls it, its checks included, with its
default settings and in training mode, so that one with state gathers it.

mlkd is far above the others by its definition: at each of its five temperatures it compares the Gram matrices of the
examples, N x N, and of the classes, K x K, which is a matrix product each way for both. Its cost falls with N and K: at
64 x 100, what it was published with, no product has more than 64 * 100 * 100 multiplications.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contenders import TEMPERATURE, Case, training_step
from benchmarks.timing import interleaved, quartiles
from kd.losses.methods import registry as methods
from kd.losses.methods.base import Method, Seen, View

PLAIN = "plain KD, eager PyTorch"


def plain(case: Case) -> Callable[[], Tensor]:
    student, teacher, _ = case.logits()

    def loss() -> Tensor:
        log_s, p_t = F.log_softmax(student / TEMPERATURE, -1), F.softmax(teacher / TEMPERATURE, -1)
        return TEMPERATURE**2 * F.kl_div(log_s, p_t, reduction="batchmean")

    return training_step(loss, student).run


def step(method: Method, case: Case) -> Callable[[], Tensor]:
    student, teacher, target = case.logits()
    seen = Seen(View(student), View(teacher), target, epoch=1.0, epochs=10)
    method.build(seen)
    method.train()
    return training_step(lambda: method.evaluate(seen).mean(), student, *method.parameters()).run


def pure() -> dict[str, type[Method]]:
    """kd's methods that need nothing but logits and labels."""
    ours = {name: methods.library()[name] for name in methods.names()}
    return {
        name: method
        for name, method in sorted(ours.items())
        if method.needs <= {"teacher", "target", "labels", "batch"}
    }


def run(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Measure, print the table, and return the ratios."""
    options = _options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    case = Case(*options.shape, "float32", options.device)
    steps = {PLAIN: plain(case)} | {name: step(method(), case) for name, method in pure().items()}
    times = interleaved(steps, options.rounds, options.device)
    medians = {name: quartiles(samples) for name, samples in times.items()}
    base = medians[PLAIN][1]
    lines = ["| method | median | quartiles | x plain KD |", "|---|---|---|---|"]
    for name, (low, median, high) in medians.items():
        lines.append(f"| {name} | {median * 1e3:.2f} ms | {low * 1e3:.2f} .. {high * 1e3:.2f} | {median / base:.2f} |")
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    n, k = options.shape
    title = f"{n} x {k}, float32, forward + backward; {where}, torch {torch.__version__}, {options.rounds} rounds"
    text = "\n".join([title, "", *lines])
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    return {name: median / base for name, (_, median, _) in medians.items()}


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--shape", type=_shape, default=(1024, 1000), metavar="NxK")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as PyTorch takes")
    parser.add_argument("--out", type=Path, help="also write the table to this Markdown file")
    return parser.parse_args(arguments)


def _shape(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be NxK, whole numbers ≥ 1")
    n, k = map(int, text.split("x"))
    return n, k


if __name__ == "__main__":
    run()
