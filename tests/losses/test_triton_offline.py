"""The machine code of the Triton kernels, compiled without a GPU for the launches that a GPU may meet.

``rows`` and ``adjust`` are called as they are, on CPU tensors; a driver stands in for the GPU's and stops after
compiling. A sample of launches is compiled by default, the rest is torture.
"""

import collections
import itertools
import re
import subprocess
import tempfile
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton", reason="triton is published for Linux only")

import triton
from triton.backends.compiler import GPUTarget

from kd.losses.kernels import triton as launcher
from kd.losses.reference import Inputs, Numbers

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
SCALARS = ("temperature", "student_temperature", "kd_weight", "ce_weight", "uniform_mass")


class Case(NamedTuple):
    """One launch. ``call``: rows with gradient, values alone, or adjust; ``terms``: a cross entropy, a KL, or both.

    ``odd``: the student's logits start at an address that allows no vector loads.
    """

    arch: str
    classes: int
    student: str = "bf16"
    teacher: str = "bf16"
    probabilities: str = ""
    weights: bool = False
    call: str = "rows"
    terms: str = "both"
    odd: bool = False

    def __str__(self):
        return "-".join(str(field) for field in self if field)


class Device:
    """As much of a Triton driver as compiling a launch asks for."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_device(self):
        return list(TARGETS).index(self.arch)  # each has its own cache of compiled kernels

    def get_current_stream(self, _):
        return 0

    def get_current_target(self):
        return TARGETS[self.arch]


class Compiling:
    """A kernel that compiles where it would run."""

    def __init__(self, kernel, into):
        self.kernel, self.into = kernel, into

    def __getitem__(self, grid):
        assert len(grid) == 1  # the only dimension of a grid that takes more than 65,535 programs
        return lambda *args, **kwargs: self.into.append(self.kernel.run(*args, grid=grid, warmup=True, **kwargs))


@pytest.fixture(scope="module", autouse=True)
def _own_cache():
    driver = triton.runtime.driver
    before = driver._active
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield
    driver._active = before  # not reset_active(), which looks for a GPU


def launch(case: Case, **settings):
    """The compiled kernel of this case and the shape of its launch."""
    compiled, shapes = [], []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("resident", "sweeps"):
            patch.setattr(launcher, name, Compiling(getattr(launcher, name), compiled))
        choose = launcher.shape_for
        patch.setattr(launcher, "shape_for", lambda *args: shapes.append(choose(*args)) or shapes[-1])
        patch.setattr(launcher, "_lanes", lambda _: TARGETS[case.arch].warp_size)
        patch.setattr(torch.version, "hip", "6.0" if case.arch.startswith("gfx") else None)
        triton.runtime.driver.set_active(Device(case.arch))
        call(case, **settings)
    return compiled[0], shapes[0]


def call(case: Case, n=2, shift=0, **settings):
    """``shift`` elements after an aligned address lies what comes from above."""
    dtype, k = DTYPES[case.student], case.classes
    numbers = Numbers(
        temperature=4.0,
        student_temperature=2.0,
        kd_weight=0.9 * (case.terms != "ce"),
        ce_weight=0.1 * (case.terms != "kd"),
        uniform_mass=0.1,
        ignore_index=-100,
    )._replace(**settings)
    s, t = (
        torch.empty(n * k + 1, dtype=dtype)[case.odd : n * k + case.odd].view(n, k),
        torch.empty(n, k, dtype=DTYPES[case.teacher]),
    )
    y = torch.empty(n, k, dtype=DTYPES[case.probabilities]) if case.probabilities else torch.zeros(n, dtype=torch.int64)
    w = torch.empty(k) if case.weights else None
    wide = torch.float64 if case.student == "fp64" else torch.float32
    upstream = torch.ones(shift + 1, dtype=wide)[shift:].expand(n)
    t = None if case.terms == "ce" else t
    if case.call == "adjust":
        launcher.adjust(torch.empty_like(s), upstream.clone(), upstream, lambda: Inputs(s, t, y, w), numbers)
    else:
        launcher.rows(Inputs(s, t, y, w), upstream, numbers, with_gradient=case.call == "rows")


# ---- what the code says


class Code(NamedTuple):
    """``ops``: how often each instruction occurs."""

    registers: int
    spilled: int
    ops: collections.Counter

    def count(self, pattern):
        return sum(n for op, n in self.ops.items() if re.fullmatch(pattern, op))


def read(compiled) -> Code:
    return _read_cdna(compiled) if "amdgcn" in compiled.asm else _read_cuda(compiled)


def _read_cuda(compiled) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    ops = collections.Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]*)", text, re.M))
    assert ops["EXIT"]
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL"))
    spilled = stack + local + sum(n for op, n in ops.items() if op.startswith(("LDL", "STL")))
    return Code(registers, spilled, ops)


def _read_cdna(compiled) -> Code:
    text = compiled.asm["amdgcn"]
    ops = collections.Counter(re.findall(r"^\s+([a-z]+_\w+)", text, re.M))
    assert ops["s_endpgm"]
    registers, spills, scratch = (
        int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    spilled = spills + scratch + sum(n for op, n in ops.items() if op.startswith("scratch_"))
    return Code(registers, spilled, ops)


def vector(case: Case) -> int:
    size = DTYPES[case.student].itemsize
    if case.odd:
        return 1
    return next(v for v in (8, 4, 2, 1) if v <= 16 // size and case.classes % v == 0)


def elements(case: Case, shape) -> int:
    """Class elements of one thread in one sweep."""
    return shape.rows * shape.block // (shape.warps * TARGETS[case.arch].warp_size)


def expected_loads(case: Case, shape) -> collections.Counter:
    """Loads of class elements by one thread in one sweep: number by bytes at a time."""
    each = elements(case, shape)
    loads = collections.Counter()
    kinds = [case.student, "" if case.terms == "ce" else case.teacher]
    if case.terms != "kd":
        kinds += [case.probabilities, "fp32" if case.weights else ""]
    for kind in filter(None, kinds):
        width = min(vector(case) * DTYPES[kind].itemsize, 16)
        loads[width] += each * DTYPES[kind].itemsize // width
    return loads


# ---- the checks

LOAD = {2: r"LDG\.E\.U16.*", 4: r"LDG\.E(\.CONSTANT)?", 8: r"LDG\.E\.64.*", 16: r"LDG\.E\.128.*"}
CDNA_LOAD = {2: "ushort", 4: "dword", 8: "dwordx2", 16: "dwordx4"}


def check(case: Case):
    compiled, shape = launch(case)
    code = read(compiled)
    assert code.spilled == 0
    assert code.registers <= 255
    assert shape.warps <= 16
    double = case.student == "fp64"
    cdna = case.arch.startswith("gfx")
    if not double:
        assert not re.search(r"\.f64", compiled.asm.get("ptx", ""))
        assert not code.count(r"v_\w+_f64\w*|D(ADD|MUL|FMA|SETP)|F2F\.F64.*")
        check_exponentials(case, shape, code, cdna)
    check_transfers(case, shape, code, cdna)
    if not cdna and case.student in ("bf16", "fp16") and case.call != "values":
        assert re.search(rf"cvt\.rn\.{case.student.replace('fp', 'f')}", compiled.asm["ptx"])  # to nearest, not cut off


def check_exponentials(case, shape, code, cdna):
    """At most three an element and sweep: e^s, e^(s/Ts), e^(t/T); with the few by which sweeps rescale their sums."""
    each = elements(case, shape)
    terms = {"both": 3, "ce": 1, "kd": 2}[case.terms]
    sweeps = 1 if shape.resident else 1 + (case.call != "values")
    rescaling = 0 if shape.resident else 2 * terms
    assert code.count(r"v_exp_f32\w*" if cdna else r"MUFU\.EX2.*") == sweeps * terms * each + rescaling


def check_transfers(case, shape, code, cdna):
    """Every element is loaded once a sweep, 16 bytes at a time where K allows, and the gradient stored likewise."""
    loads = expected_loads(case, shape)
    sweeps = 1 if shape.resident or case.call == "values" else 2

    def count(kind, width):
        if cdna:
            name = CDNA_LOAD[width] if kind == "load" else CDNA_LOAD[width].removeprefix("u")
            return code.count(rf"(global|buffer|flat)_{kind}_{name}")
        return code.count(LOAD[width] if kind == "load" else LOAD[width].replace("LDG", "STG"))

    if shape.rows > 1:  # what is loaded once a row depends on how many of them a thread holds
        assert all(count("load", width) >= n for width, n in loads.items())
        return
    for width in LOAD:
        # A few once a row: upstream, held, the label and its logit.
        alone = count("load", width) - sweeps * loads[width]
        assert 0 <= alone <= (6 if width <= 8 else 0), (width, alone)
    size = DTYPES[case.student].itemsize
    width = min(vector(case) * size, 16)
    if case.call != "values":
        stores = elements(case, shape) * size // width
        assert count("store", width) >= stores
        if shape.resident and width == 16:
            assert count("store", width) == stores


PAIRS = [
    *(("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")),
    *(("fp64", "fp64"), ("fp64", "bf16")),
]
TARGETS_OF_CE = [("", False), ("", True), ("fp32", False), ("fp32", True), ("bf16", False)]


def cases() -> list[Case]:
    """For each kind of launch one on each kind of GPU."""
    some = [Case(arch, k) for arch in ("sm_90", "gfx942") for k in (10, 100, 1000, 1001, 4096, 8192, 16384, 128256)]
    some += [Case(arch, k) for arch in ("sm_80", "sm_100") for k in (8192, 16384, 21841)]
    some += [Case(arch, k, "bf16", "bf16", "fp32", True) for arch in TARGETS for k in (1001, 21841)]
    some += [Case("sm_80", 1001, "bf16", "bf16", "fp32")]  # the one that spills without a limit of registers
    for i, (arch, k) in enumerate(itertools.product(TARGETS, (1000, 8192, 50256))):
        some.append(Case(arch, k, *PAIRS[1 + i % 6]))
        some.append(Case(arch, k, "bf16", "bf16", *TARGETS_OF_CE[1 + i % 4]))
        some.append(Case(arch, k, *PAIRS[i % 3], odd=True))
        some.append(Case(arch, k, call=("adjust", "values")[i % 2], terms=("both", "ce", "kd")[i % 3]))
    return list(dict.fromkeys(some))


SAMPLE = {  # by default
    Case("sm_90", 8192),
    Case("sm_90", 128256),
    Case("gfx942", 1001),
    Case("sm_80", 1001, "bf16", "bf16", "fp32"),
    Case("sm_100", 21841, "bf16", "bf16", "fp32", True),
}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if c in SAMPLE else pytest.mark.torture) for c in cases()], ids=str
)
def test_machine_code(case):
    check(case)


@pytest.mark.parametrize(("k", "student"), [(40, "fp64"), (40000, "bf16")])
def test_nothing_that_changes_in_training_compiles_anew(k, student):
    case = Case("sm_90", k, student, student)
    kernel = launch(case)[0]
    changes = [{"n": n} for n in (1, 3, 16, 17, 64)]
    changes += [{name: value} for name in SCALARS for value in (1, 1.0, 16.0, 0.37)]
    changes += [{"shift": 1}, {"uniform_mass": 0.0}, {"uniform_mass": 0}, {"ignore_index": 1}, {"ignore_index": 16}]
    for change in changes:
        assert launch(case, **change)[0] is kernel, change
