"""Hostile recipes, studies and command lines: each is checked, or told in one clear line, soon, and writes nothing."""

from __future__ import annotations

import contextlib
import io
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from kd import train
from kd.cli.errors import USAGE, one_line_errors
from kd.config.schema import DataConfig, Recipe
from kd.config.types import settings
from kd.losses.methods import registry as methods
from kd.study import __main__ as command
from kd.study.grid import plan
from kd.study.schema import StudyRecipe
from tests.torture.harness import Part

BATCH = 100  # inputs in a trial
SECONDS = 1.0
# ruff: noqa: E501 (two tables of short values)
PLAUSIBLE = ("0", "1", "2", "10", "0.1", "1e-3", "0.5", "true", "false", "null", "uniform", "adamw", "mlp_tiny", "[]", "[1,2]")  # fmt: skip
HOSTILE = (
    "-1", "nan", ".nan", "inf", "-.inf", "1e999", "9" * 400, "010", "0x10", "1_000", "1:30", "no", "yes", "on", "off", "~",
    "", " ", "''", '"', "'", "${seed}", "${oc.env:HOME}", "${oc.decode:1}", "${loss.temperature}", "${nosuch}", "${", "\\${seed}",
    "!!python/object/apply:os.system [x]", "*a", "&a 1", "{_target_: os.system}", "[[[[1]]]]", "[" * 1000, "{a: " * 300,
    "{a: 1}", "{a:1}", "a=b", "a,b", "range(1,3)", "glob(*)", "../../etc/passwd", "/etc/passwd", "os.system", "\x00", "\x1b[2J",
    "\ud800", "ä", "名前", "\n", "a: b", "- 1", "???", "x" * 100_000, "<script>", "=cmd", "%", "#", "@", "|", ">", "\t",
)  # fmt: skip
KEYS = (
    "hydra.run.dir", "hydra/launcher", "hydra.searchpath", "_target_", "+x", "~seed", "++seed", "seed@pkg", "recipe@x", "data",
    "loss", "loss.methods.dkd.weight", "study.grid", "study.contrasts", "how", "+study.grid.how.a", "+teacher.model_kwargs.a", "--config-dir", "-cd", "--cfg", "-m", "defaults", "", "lr", "__class__",
)  # fmt: skip


def _value(rng: random.Random) -> str:
    return rng.choice(PLAUSIBLE if rng.random() < 0.6 else HOSTILE)


def line(rng: random.Random, recipe: str) -> list[str]:
    """A command line: mostly real settings, some words that are none."""
    names = list(settings(StudyRecipe if recipe.startswith("studies") else Recipe))
    words = [f"recipe={recipe}"] if rng.random() < 0.95 else []
    for _ in range(rng.randint(0, 3)):
        draw = rng.random()
        if draw < 0.8:
            several = [_value(rng) for _ in range(2 if "studies" in recipe and draw < 0.3 else 1)]
            words.append(f"{rng.choice(names)}={','.join(several)}")
        elif draw < 0.95:
            words.append(f"{rng.choice(KEYS)}={_value(rng)}")
        else:
            words.append("".join(chr(rng.randrange(1, 0x250)) for _ in range(rng.randint(0, 12))))
    return words


EXTRA = (
    "seed: 1", "hydra: {run: {dir: /}}", "defaults: [override /data: mnist1d]", "defaults: [x]", "<<: {seed: 1}", "_target_: x",
    "teacher: 3", "loss: {methods: {dkd: {weight: 1}}}", "loss: {methods: [1]}", "? [a]", "---", "...",
)  # fmt: skip


def content(rng: random.Random) -> bytes:
    """A recipe: real settings with drawn values, often with a strange line, or with bytes changed."""
    lines = [rng.choice(EXTRA)] if rng.random() < 0.3 else []
    for name in rng.sample(list(settings()), rng.randint(1, 5)):
        section, _, key = name.rpartition(".")
        setting = f"{key}: {_value(rng)[:5000]}"
        lines += [f"{section}:", f"  {setting}"] if section else [setting]
    text = bytearray("\n".join(lines).encode(errors="surrogatepass"))
    for _ in range(rng.choice([0, 0, 0, 1, 4])):
        at = rng.randrange(len(text) + 1)
        text[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 3))
    return bytes(text)


SMALL = b"""name: t
data: {name: digits, family: digits, image_size: 8}
loss: {temperature: 1.0, kd_weight: 1.0, ce_weight: 0.0}
"""


def study(rng: random.Random) -> bytes:
    """A study: a small recipe, or a hostile one, with a drawn grid, contrasts and other settings."""

    def drawn() -> str:
        return _value(rng)[:400]

    axes = [f"{rng.choice([*settings(), 'how', 'loss'])}: [{drawn()}, {drawn()}]" for _ in range(rng.randint(0, 2))]
    if rng.random() < 0.4:
        axes.append(f"how: {{a: {{{rng.choice(list(settings()))}: {drawn()}}}, b: {{}}}}")
    lines = ["study:", f"  grid: {{{', '.join(axes)}}}" if rng.random() < 0.9 else f"  grid: {drawn()}"]
    if rng.random() < 0.4:
        lines.append(f"  contrasts: [{{name: x, metric: {drawn()}, a: {{how: a}}, b: {{control: {drawn()}}}}}]")
    if rng.random() < 0.4:
        lines.append(f"  {rng.choice(['seeds', 'engine', 'controls', 'claim', 'control_smoothing'])}: {drawn()}")
    base = SMALL if rng.random() < 0.8 else content(rng) + b"\n"
    return base + "\n".join(lines).encode(errors="surrogatepass")


def _train(words: list[str], found: list[Recipe]) -> None:
    with one_line_errors("kd.train"):
        train.main(words, lambda recipe, check=None: found.append(recipe) or 0)


def _study(words: list[str], found: list[Recipe]) -> None:
    """As far as a study goes before it loads data."""
    with one_line_errors(command.PROGRAM):
        if composed := command.compose(words):
            plan(composed[0], unloaded, composed[2])
            found.append(composed[0])


def unloaded(config: DataConfig) -> SimpleNamespace:
    """As much of a data set as a plan needs."""
    return SimpleNamespace(hash=config.name, train=SimpleNamespace(posterior=None, augments=False))


def attempt(words: list[str], run: Callable[[list[str], list[Recipe]], None] = _train) -> tuple[str, list[Recipe]]:
    """What is said of a command line, and the recipes it would run; any traceback comes through."""
    found: list[Recipe] = []
    code: object = 0
    said, before = io.StringIO(), sys.argv
    sys.argv = ["kd.train", *words]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            run(words, found)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
    assert code == (0 if found else USAGE) or (not said.getvalue() and code == 0), f"{words}: exit code {code}"
    return said.getvalue(), found


def _prepare(folder: Path) -> None:
    (folder / "recipes" / "studies").mkdir(parents=True, exist_ok=True)
    (folder / "recipes" / "studies" / "small.yaml").write_bytes(
        SMALL + b"study: {grid: {loss.temperature: [1, 4], how: {a: {}, b: {}}}}"
    )
    methods.library()  # torch is imported once, at the first method that is named
    attempt(["recipe=smoke"])
    with contextlib.chdir(folder):
        attempt(["recipe=studies/small"], _study)  # the first study has imports too


def _trial(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    counts = {"recipes that may run": 0, "studies that may run": 0, "lines refused": 0}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for n in range(BATCH):
            own, run = n % 2 == 0, _study if n % 4 > 1 else _train
            file = Path("recipes/studies/fuzzed.yaml" if run is _study else "recipes/fuzzed.yaml")
            if own:
                file.write_bytes(study(rng) if run is _study else content(rng))
            name = ("studies/fuzzed" if own else "studies/small") if run is _study else "fuzzed" if own else "smoke"
            words = line(rng, name)
            files = sorted(Path.cwd().rglob("*"))
            try:
                started = time.process_time()  # of this process: others may share its core
                said, found = attempt(words, run)
                seconds = time.process_time() - started
            except Exception as error:
                recipe = file.read_bytes() if own else b""
                raise AssertionError(
                    f"input {n}: {[w[:80] for w in words]} {recipe[:300]!r}: {error!r}"[:1500]
                ) from error
            assert seconds < SECONDS, f"input {n}: {[w[:80] for w in words]}: {seconds:.2f} s"
            if not found:
                one_line = said.startswith("error: ") and said.count("\n") == 1 and len(said) < 2000
                shows = {"--cfg", "-c", "-h", "--help"} & set(words)
                assert shows or one_line, f"input {n}: {[w[:80] for w in words]}: {said[:300]!r}"
            assert sorted(Path.cwd().rglob("*")) == files, (
                f"input {n}: {words}: wrote {set(Path.cwd().rglob('*')) - set(files)}"
            )
            may = "studies that may run" if run is _study else "recipes that may run"
            counts[may if found else "lines refused"] += 1
    finally:
        os.chdir(before)
        for path in Path(folder, "recipes").rglob("fuzzed.yaml"):
            path.unlink()
    return counts


PROMISE = "10,000 fuzzed recipes, studies and command lines: checked, or one clear line, within 1 s; nothing written"
PARTS = (Part("fuzz", PROMISE, trials=100, small=1, trial=_trial, prepare=_prepare),)
