"""Time and memory of DistillLoss and LinearDistillLoss beside other implementations, in one run.

Medians and quartiles over interleaved rounds of forward and backward; peak memory of one step beyond its inputs.
"speed-up" is eager's time over the row's, "x floor" the row's time over that of one ``torch.add`` of the two logits.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SHAPES = "8x10,256x100,1024x1000,128x21841,64x128256"
LINEAR = "2048x512x32768"


def run(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, and return what was measured."""
    options = _options(arguments)
    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    result: dict[str, Any] = {"setup": _setup(options), "losses": [], "linear": []}
    say = _Output()
    say.text(", ".join(f"{key} {value}" for key, value in result["setup"].items()))
    for dtype in options.dtypes:
        for n, k in options.shapes:
            rows = _measure_losses(n, k, dtype, options)
            result["losses"] += rows
            say.table(f"{n} x {k}, {dtype}: forward + backward", rows, LOSS_COLUMNS)
    if options.linear:
        result["linear"] = _measure_linear(*options.linear, options)
        n, d, k = options.linear
        say.table(f"linear head, {n} x {d} -> {k}, float32: forward + backward", result["linear"], LINEAR_COLUMNS)
    if options.out:
        text = json.dumps(result, indent=2) + "\n" if options.out.suffix == ".json" else say.markdown()
        options.out.write_text(text)
        say.text(str(options.out))
    return result


def _measure_losses(n: int, k: int, dtype: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.contenders import LOSSES, Case

    case = Case(n, k, dtype, options.device)
    rows = _measure(LOSSES, case, options)
    seconds = {row["name"]: row["seconds"] for row in rows if row["seconds"]}
    for row in rows:
        if row["seconds"]:
            row["speedup"] = seconds["eager PyTorch"] / row["seconds"]
            row["floor"] = row["seconds"] / seconds["floor: torch.add"]
        if row["name"] == "kd DistillLoss" and options.device == "cuda":
            row["note"] += _bandwidth(case, row["seconds"])
    return rows


def _measure_linear(n: int, d: int, k: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    from benchmarks.contenders import LINEAR as BUILDERS
    from benchmarks.contenders import Case

    case = Case(n, k, "float32", options.device, d)
    rows = _measure(BUILDERS, case, options)
    unfused, ours = rows
    if unfused["seconds"] and ours["seconds"]:
        ours["time_ratio"] = ours["seconds"] / unfused["seconds"]
        ours["difference"] = _difference(case, *BUILDERS.values())
    if unfused["memory"] and ours["memory"]:
        ours["memory_ratio"] = unfused["memory"] / ours["memory"]
    return rows


def _measure(builders: dict[str, Callable], case: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each implementation; one that is missing or fails says so in its note."""
    from benchmarks.contenders import Missing
    from benchmarks.timing import interleaved, peak_memory, peak_memory_apart, quartiles

    steps, rows = {}, []
    for name, build in builders.items():
        row = {"name": name, "n": case.n, "k": case.k, "dtype": case.dtype, "note": ""}
        row |= dict.fromkeys(("seconds", "quartiles", "memory", "loss", "speedup", "floor"))
        rows.append(row)
        try:
            steps[name] = build(case)
            value = steps[name].run()
            row["note"] = steps[name].note
            row["loss"] = value.item() if value.ndim == 0 else None
        except Missing as why:
            row["note"] = str(why)
        except Exception as error:  # another library's failure is a line of the table, not the end of it
            steps.pop(name, None)
            row["note"] = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:80]}"
    times = interleaved({name: step.run for name, step in steps.items()}, options.rounds, options.device)
    for row in rows:
        if row["name"] not in steps:
            continue
        low, row["seconds"], high = quartiles(times[row["name"]])
        row["quartiles"] = [low, high]
        step = steps.pop(row["name"])
        if options.device == "cuda":
            row["memory"] = peak_memory(step.run, step.leaves, options.device)
        elif options.memory:
            row["memory"] = peak_memory_apart(row["name"], [case], options.threads)[0]
    return rows


def _difference(case: Any, *builders: Callable) -> float:
    """The largest difference between two implementations' losses and gradients, relative to the largest value."""
    results = []
    for build in builders:
        step = build(case)
        results.append([step.run(), *(leaf.grad for leaf in step.leaves)])
    pairs = list(zip(*results, strict=True))
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs)


def _bandwidth(case: Any, seconds: float | None) -> str:
    """What a loss that reads both logits and writes a gradient moves, against a copy of as much memory."""
    import torch

    from benchmarks.timing import interleaved, quartiles

    if not seconds:
        return ""
    source = torch.empty(2**28, dtype=torch.uint8, device=case.device)
    target = torch.empty_like(source)
    copy = quartiles(interleaved({"copy": lambda: target.copy_(source)}, 10, case.device)["copy"])[1]
    peak = 2 * source.numel() / copy
    transfers = _transfers(case)
    moved = transfers * case.n * case.k * getattr(torch, case.dtype).itemsize / seconds
    return f", {transfers} transfers at {moved / 1e9:.0f} GB/s, {moved / peak:.0%} of a copy's {peak / 1e9:.0f}"


def _transfers(case: Any) -> int:
    """How often the kernel moves a logit: 3 where rows stay in registers, 5 in two sweeps."""
    import torch

    from kd.losses.kernels.triton import shape_for

    wide = torch.float64 if case.dtype == "float64" else torch.float32
    return 3 if shape_for(case.k, wide, False, 64 if torch.version.hip else 32).resident else 5


def _setup(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name() if options.device == "cuda" else _processor()
    return {
        "device": device,
        "threads": options.threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": options.rounds,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def _bytes(value: int) -> str:
    return f"{value / 2**20:.1f} MiB" if value >= 2**20 else "< 1 MiB"


LOSS_COLUMNS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "": lambda row: row["name"],
    "median": lambda row: row["seconds"] and _seconds(row["seconds"]),
    "quartiles": lambda row: row["quartiles"] and " .. ".join(map(_seconds, row["quartiles"])),
    "speed-up": lambda row: row["speedup"] and f"{row['speedup']:.2f}",
    "x floor": lambda row: row["floor"] and f"{row['floor']:.2f}",
    "peak memory": lambda row: None if row["memory"] is None else _bytes(row["memory"]),
    "note": lambda row: row["note"],
}
LINEAR_COLUMNS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "": lambda row: row["name"],
    "median": LOSS_COLUMNS["median"],
    "quartiles": LOSS_COLUMNS["quartiles"],
    "time / unfused": lambda row: f"{row['time_ratio']:.2f}" if "time_ratio" in row else None,
    "peak memory": LOSS_COLUMNS["peak memory"],
    "unfused / memory": lambda row: f"{row['memory_ratio']:.1f}" if "memory_ratio" in row else None,
    "difference": lambda row: f"{row['difference']:.1e}" if "difference" in row else None,
    "note": lambda row: row["note"],
}


class _Output:
    """Tables on the screen, and the same as Markdown."""

    def __init__(self):
        from rich.console import Console

        self.console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160, highlight=False)
        self.parts: list[str] = []

    def text(self, line: str) -> None:
        self.console.print(line, markup=False)
        self.parts.append(line)

    def table(self, title: str, rows: list[dict[str, Any]], columns: dict[str, Callable]) -> None:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
        lines = [[cell(row) or "" for cell in columns.values()] for row in rows]
        for name in columns:
            table.add_column(name, justify="left" if name in ("", "note") else "right", no_wrap=name != "note")
        for line in lines:
            table.add_row(*map(Text, line))
        self.console.print(table)
        markdown = [f"| {' | '.join(cells)} |" for cells in (list(columns), ["---"] * len(columns), *lines)]
        self.parts.append("\n".join([f"**{title}**", "", *markdown]))

    def markdown(self) -> str:
        return "\n\n".join(self.parts) + "\n"


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=_shapes, default=SHAPES, help=f"NxK,...; default {SHAPES}")
    parser.add_argument(
        "--linear", type=_linear, default=LINEAR, help=f"rows x features x classes, or none; default {LINEAR}"
    )
    parser.add_argument(
        "--dtypes", type=_dtypes, default="float32,bfloat16", help="of float32, bfloat16, float16, float64"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--threads", type=_at_least_one, help="of PyTorch; default: its own")
    parser.add_argument("--rounds", type=_at_least_one, default=20, help="samples of each row; default 20")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="leave out the peaks on a CPU")
    parser.add_argument("--out", type=_out, help="also write FILE.json (everything) or FILE.md (the tables)")
    options = parser.parse_args(arguments)
    if find_spec("rich") is None:
        parser.exit(1, "benchmarks.loss needs rich for its tables: pip install 'kd-torch[train]'\n")
    import torch

    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    return options


def _sizes(text: str, count: int, form: str) -> tuple[int, ...]:
    try:
        sizes = tuple(_at_least_one(part) for part in text.split("x"))
    except argparse.ArgumentTypeError:
        sizes = ()
    if len(sizes) != count:
        raise argparse.ArgumentTypeError(f"{text!r}: must be {form}, whole numbers ≥ 1")
    return sizes


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [_sizes(part, 2, "NxK") for part in text.split(",") if part]


def _linear(text: str) -> tuple[int, ...] | None:
    return None if text == "none" else _sizes(text, 3, "NxDxK or none")


def _dtypes(text: str) -> list[str]:
    known = ("float32", "bfloat16", "float16", "float64")
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r}: must be of {', '.join(known)}")
    return text.split(",")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number ≥ 1")
    return int(text)


def _out(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".json", ".md"):
        raise argparse.ArgumentTypeError(f"{text!r}: must end in .json or .md")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: no such folder {path.parent}")
    return path


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="torch")  # the compiler's advice is no measurement
    run()
