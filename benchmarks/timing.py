"""Interleaved timing, and the peak memory of a step beyond the memory in use before it."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

# A sample repeats a step for about this long, and at least this often.
LEAST_SECONDS = 1e-2
LEAST_CALLS = 3
WARM_SECONDS = 5e-2


def interleaved(steps: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of one step, ``rounds`` samples of each. Every round runs all steps, so that noise affects all alike.

    Before each sample its step runs unmeasured for WARM_SECONDS. Otherwise it would pay for the caches and the
    allocator as its predecessor left them, short steps most of all. After that time the measured times are stable.
    """
    sample = _cuda_sample if device == "cuda" else _cpu_sample
    repeats, warm_up = {}, {}
    for name, step in steps.items():
        step()
        seconds = max(sample(step, 1), 1e-9)
        repeats[name], warm_up[name] = (max(LEAST_CALLS, round(s / seconds)) for s in (LEAST_SECONDS, WARM_SECONDS))
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            for _ in range(warm_up[name]):
                step()
            times[name].append(sample(step, repeats[name]))
    return times


def _cpu_sample(step: Callable[[], object], repeats: int) -> float:
    """The median, because on a shared machine one call in ten may wait for its core a hundred times its own length."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _cuda_sample(step: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(times) < 2:
        return (times[0],) * 3
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, middle, high


def peak_memory(step: Callable[[], object], leaves: Sequence[torch.Tensor], device: str) -> int | None:
    """Bytes that one step takes at its peak beyond what was held before; None where the system does not say.

    The gradients that it leaves in ``leaves`` count as its own.
    """
    step()  # what is allocated once, such as a library's buffers, does not
    for leaf in leaves:
        leaf.grad = None
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    return _peak_resident(step)


def _peak_resident(step: Callable[[], object]) -> int | None:
    """By Linux's own high-water mark of resident memory, which a 5 written to clear_refs resets."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide an allocation
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return max(_status("VmHWM") - before, 0)
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def peak_memory_apart(name: str, cases: Sequence[Sequence], threads: int) -> list[int | None]:
    """``peak_memory`` of a contender for each case, in a process of its own.

    There every allocation from 64 KiB up is a mapping that returns to the system when it is freed, so that what is
    resident is what is held.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    task = json.dumps({"name": name, "cases": cases, "threads": threads})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.timing", task],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
    )
    if done.returncode:
        return [None] * len(cases)
    return json.loads(done.stdout.splitlines()[-1])


def _apart(task: dict) -> list[int | None]:
    from benchmarks.contenders import EVERY, Case

    torch.set_num_threads(task["threads"])
    peaks: list[int | None] = []
    for case in task["cases"]:
        case = Case(*case)
        try:
            step = EVERY[task["name"]](case)
            peaks.append(peak_memory(step.run, step.leaves, case.device))
        except Exception:  # the timing says why in its own row
            peaks.append(None)
    return peaks


if __name__ == "__main__":
    print(json.dumps(_apart(json.loads(sys.argv[1]))))
