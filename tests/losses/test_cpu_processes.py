"""The CPU kernel in threads, in processes and in numba's cache: always the same bits, and compiled once."""

import os
import subprocess
import sys

import pytest
import torch
from loss_checks import DTYPES, F32, batch, class_weights, results

from kd.losses.kernels import cpu


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_repeat_on_any_number_of_threads(dtype, threads, monkeypatch):
    """Also on the pool that stands in where torch has another OpenMP."""
    for rows, counts, changed in ((31, (1, 2, 5), {"student_temperature": 2.5}), (200, (1, 8, 8), {})):
        inputs = batch(rows, 3000, dtype)
        settings = {"class_weight": class_weights(3000), "label_smoothing": 0.1, **changed}
        runs = []
        for count in counts:
            threads(count)
            runs.append(results("cpu", *inputs, **settings))
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_openmp", lambda: None)
            runs.append(results("cpu", *inputs, **settings))
        for run in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


IN_A_CHILD = """
import os, signal, torch
from kd.losses.kernels import cpu
from kd.losses.reference import Inputs, Numbers
torch.set_num_threads(2)
s, t, y, up = torch.randn(64, 2000), torch.randn(64, 2000), torch.randint(2000, (64,)), torch.ones(64)
def run():
    return cpu.rows(Inputs(s, t, y, None), up, Numbers(4.0, 4.0, 1.0, 1.0, 0.1, -100), with_gradient=True)
before = run()
child = os.fork()
if child == 0:
    signal.alarm(60)  # nobody waits for a child that hangs
    # Compared by numpy: an operator of torch's would itself wait for the parent's threads.
    same = all((a.numpy() == b.numpy()).all() for a, b in zip(before, run()))
    os._exit(0 if same else 3)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert code == 0, code
assert all(torch.equal(a, b) for a, b in zip(before, run()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_in_a_forked_child():
    """The parent's threads do not exist there: a DataLoader's worker that waited for them would wait for ever."""
    done = subprocess.run([sys.executable, "-c", IN_A_CHILD], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


COMPILED_OR_LOADED = """
import hashlib, sys, warnings
import torch
from numba.core import caching
from kd.losses.kernels import cpu
from kd.losses.reference import Inputs, Numbers
warnings.simplefilter("error")
if sys.argv[1] == "compiled":
    caching.FunctionCache._impl_class._locator_classes = []
bits = hashlib.sha256()
for k, student_temperature, upstream in ((100, 20.0, 1.0), (1025, 2.5, 0.3), (3000, 4.0, 1.0)):
    s, t = (3 * torch.randn(6, k, generator=torch.Generator().manual_seed(i)) for i in range(2))
    y, weight, up = torch.arange(6), torch.linspace(0.5, 2, k), torch.full((6,), upstream)
    for eps in (0.0, 0.1):
        numbers = Numbers(4.0, student_temperature, 0.9, 1.0, eps, -100)
        for value in cpu.rows(Inputs(s, t, y, weight), up, numbers, with_gradient=True):
            bits.update(value.numpy().tobytes())
print(cpu._compiled(torch.float32)[1].cache_hits, bits.hexdigest())
"""


@pytest.mark.torture  # half a minute of compilation
def test_a_process_that_compiles_and_one_that_loads_the_cache_give_the_same_bits():
    """Without a warning, also where nothing can be written: numba does not cache there and every process compiles."""
    results("cpu", *batch(dtype=F32))  # there is something to load
    printed = {}
    for how in ("compiled", "loaded"):
        words = [sys.executable, "-c", COMPILED_OR_LOADED, how]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
        assert done.stderr == ""
        printed[how] = done.stdout.split()
    assert [printed["compiled"][0], printed["loaded"][0]] == ["0", "1"]
    assert printed["compiled"][1] == printed["loaded"][1]
