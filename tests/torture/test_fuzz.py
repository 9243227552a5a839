"""Hostile recipes, studies and command lines: each is checked, or told in one clear line, soon, and writes nothing."""

from __future__ import annotations

import contextlib
import io
import random
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from kd import train
from kd.cli.errors import USAGE, one_line_errors
from kd.config.schema import DataConfig, Recipe
from kd.config.types import settings
from kd.data.base import Preprocess
from kd.losses.methods import registry as methods
from kd.study import __main__ as command
from kd.study.grid import Plan
from kd.study.schema import StudyRecipe

INPUTS = 400  # of a test
SECONDS = 10  # of CPU; a busy machine doubles them, and what grows without bound takes minutes
# ruff: noqa: E501 (two tables of short values)
PLAUSIBLE = ("0", "1", "2", "10", "0.1", "1e-3", "0.5", "true", "false", "null", "uniform", "adamw", "mlp_tiny", "[]", "[1,2]")  # fmt: skip
HOSTILE = (
    "-1", "nan", ".nan", "inf", "-.inf", "1e999", "9" * 400, "010", "0x10", "1_000", "1:30", "no", "yes", "on", "off", "~",
    "", " ", "''", '"', "'", "${seed}", "${oc.env:HOME}", "${oc.decode:1}", "${loss.temperature}", "${nosuch}", "${", "\\${seed}",
    "!!python/object/apply:os.system [x]", "*a", "&a 1", "{_target_: os.system}", "[[[[1]]]]", "[" * 1000, "{a: " * 300,
    "{a: 1}", "{a:1}", "a=b", "a,b", "range(1,3)", "glob(*)", "../../etc/passwd", "/etc/passwd", "os.system", "\x01", "\x1b[2J",
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


def _train(words: list[str]) -> bool:
    """Whether there is a recipe to run."""
    made = []
    with one_line_errors("kd.train"):
        train.main(words, lambda recipe, check=None: made.append(recipe) or 0)
    return bool(made)


def _study(words: list[str]) -> bool:
    """Whether there is a study to run; as far as it goes before it loads data."""
    with one_line_errors(command.PROGRAM):
        if composed := command.compose(words):
            Plan(composed[0], unloaded)
        return bool(composed)


def unloaded(config: DataConfig) -> SimpleNamespace:
    """As much of a data set as a plan needs."""
    images = Preprocess((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0, "center")
    train = SimpleNamespace(posterior=None, augments=False)
    return SimpleNamespace(hash=config.name, train=train, preprocess=images)


def attempt(words: list[str], run: Callable[[list[str]], bool]) -> tuple[bool, str]:
    """Whether a command line would run, and what is said of it if not; any traceback comes through."""
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        try:
            runs, code = run(words), 0
        except SystemExit as stop:
            runs, code = False, stop.code
    told = said.getvalue()
    assert code == (USAGE if told and not runs else 0), f"exit code {code}"
    return runs, told


@pytest.mark.torture
@pytest.mark.parametrize("part", range(8))
def test_a_fuzzed_recipe_study_or_line_is_checked_or_refused_in_one_line_and_nothing_is_written(
    part, rng, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes/studies").mkdir(parents=True)
    small = SMALL + b"study: {grid: {loss.temperature: [1, 4], how: {a: {}, b: {}}}}"
    (tmp_path / "recipes/studies/small.yaml").write_bytes(small)
    methods.library()
    assert attempt(["recipe=smoke"], _train)[0]  # both import once, which takes longer
    assert attempt(["recipe=studies/small"], _study)[0]
    may_run = {_train: 0, _study: 0}
    for n in range(INPUTS):
        run = _study if n % 4 > 1 else _train
        folder, known = ("studies/", "small") if run is _study else ("", "smoke")
        file = tmp_path / f"recipes/{folder}fuzzed.yaml"
        file.write_bytes(study(rng) if run is _study else content(rng))
        words = line(rng, folder + ("fuzzed" if n % 2 else known))
        what = f"input {n}: {[w[:80] for w in words]} {file.read_bytes()[:300]!r}"
        files = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr("sys.argv", ["kd.train", *words])
        started = time.process_time()  # of this process: others may share its core
        try:
            runs, said = attempt(words, run)
        except Exception as error:
            raise AssertionError(f"{what}: {error!r}") from error
        assert time.process_time() - started < SECONDS, what
        if not runs and not {"--cfg", "-c", "-h", "--help"} & set(words):
            assert said.startswith("error: "), f"{what}: {said[:300]!r}"
            assert said.count("\n") == 1, f"{what}: {said[:300]!r}"
            assert len(said) < 2000, f"{what}: {said[:300]!r}"
        assert sorted(tmp_path.rglob("*")) == files, what
        may_run[run] += runs
    assert min(may_run.values()) > 5
