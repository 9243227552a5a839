"""``python -m tests.bad_lines``: two hundred bad inputs typed into kd's commands, and what each is told, as Markdown.

Every one is typed in an empty folder of which nothing may have changed afterwards.
"""

# ruff: noqa: E501 (a table)
from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kd.cli.errors import one_line_errors
from kd.text import plain


class Told(NamedTuple):
    """An input, what kd said of it on stderr, and the exit code."""

    line: str
    message: str
    code: object


# kd.train recipe=smoke WORD, and what the message must name.
WORDS = {
    "loss.temprature=2": "loss.temperature", "+learning=1": "learning", "student.epochs=1.5": "whole number",
    "student.epochs=-1": "≥ 1", "optimizer.lr=-0.1": "> 0", "optimizer.lr=.nan": "optimizer.lr", "optimizer.lr=inf": "finite",
    "optimizer.lr=[1,2]": "optimizer.lr", "optimizer.lr={a:1}": "optimizer.lr", "seed=0x10": "whole number", "seed=1:30": "seed",
    "seed=-1": "≥ 0", "seed=true": "seed", "seed=4294967296": "< 2147483648", "loss.label_smoothing=1": "< 1", "loss.label_smoothing=-0.1": "≥ 0",
    "loss.label_smoothing=nan": "finite", "loss.temperature=0": "≥ 0.001", "loss.temperature=inf": "finite", "loss.smoothing=both": "uniform, others",
    "loss.kd_weight=-1": "≥ 0", "loss.ce_weight=nan": "finite", "loss.backend=cuda": "reference", "loss.student_temperature=0": "≥ 0.001", "loss.kd_weight=1e300": "≤ 1000000",
    "loss.teacher_smoothing=1": "< 1", "loss=dkdd": "dkd", "loss.methods.nosuch.weight=1": "loss.methods.nosuch", "resume=maybe": "true or false",
    "tracker=no": "none, tensorboard, trackio", "train.precision=fp8": "fp32", "train.batch_size=5000": "≤ 1293", "train.batch_size=0": "≥ 1",
    "train.ema_decay=1": "< 1", "data.val_fraction=0.9": "< 0.5", "data.image_size=100000": "≤ 4096", "data.family=mine": "digits",
    "data.label_noise=1": "< 1", "data.hflip=2": "≤ 1", "data=cifar": "cifar10", "data=imagenet": "data.root", "data=2": "digits",
    "data.omit_class=99": "data.omit_class", "scheduler.milestones=[-3,0]": "rising", "scheduler.milestones=abc": "list", "scheduler.warmup_epochs=1": "student.epochs",
    "optimizer.name=adamww": "adamw", "student.model=resnet19": "student.model", "teacher.checkpoint=missing.pth": "no such file",
    "teacher.checkpoint=/dev/null": "teacher.checkpoint", "teacher.checkpoint=.": "is a folder", "+student.model_kwargs.nonsense=1": "nonsense",
    "run=../elsewhere": "plain folder name", "run=/tmp/x": "plain folder name", "run=link": "link", "name=a/b": "plain folder name", "name=teachers": "teachers",
    "output=": "output", "output=/dev/null/x": "output", "recipe=resnet34_to_18": "one recipe=", "~seed": "seed=VALUE", "+seed=1": "seed=VALUE",
    "++seed=1": "seed=VALUE", "seed@pkg=1": "seed@pkg", "hydra.run.dir=x": "hydra.run.dir", "hydra.searchpath=[file:///]": "hydra.searchpath",
    "hydra/launcher=evil": "evil", "+hydra.callbacks.x._target_=os.system": "_target_", "--config-dir=/tmp": "--config-dir", "--config-path=/tmp": "--config-path",
    "-cd": "-cd", "--cfg": "--cfg job", "--import": "--import", "": "empty word", "=": "key=value", "a=b=c": "a=b=c", "dry_run": "dry_run=true",
    "run=a{b": "run=a{b", "loss.temperature=4,5": "-m", "seed=${seed}": "seed", "seed=${oc.env:HOME}": "references", "seed=${nosuch}": "nosuch",
    "run=" + "x" * 1_000_000: "2000 bytes", "scheduler.milestones=" + "[" * 1000: "nested", "teacher=3": "teacher.model", "run=a\x1bb": "printable",
    "loss.kd_weight=0 loss.ce_weight=0": "loss.kd_weight", "data.omit_class=1 data.label_noise=0.1": "omit_class", "replay=nowhere": "replay",
    "replay=hostile": "provenance",
}  # fmt: skip
# A recipe's content, and what the message must name beside the file.
RECIPES = {
    b"seed: 1\nseed: 2": "line 2: seed", b"teacher: {modle: x}": "modle", b"seeed: 1": "seed", b"loss: {temperature: .nan}": "line 1: .nan",
    b"name: !!python/object/apply:os.system [x]": "tags", b"a: &a [x]\nb: *a": "aliases", b"[" * 60_000: "deeper", b"hydra: {run: {dir: /}}": "hydra",
    b"defaults: [override hydra/launcher: evil]": "override /data: NAME", b"teacher: {model_kwargs: {_target_: os.system}}": "_target_",
    b"name: ${oc.env:HOME}": "references", b"name: \xff": "UTF-8", b"name: a\x00": "position", b"x" * 70_000: "64 KiB", b"- 1": "settings such as",
    b"name: [": "line", b"student: {epochs: -1}": "student.epochs", b"student: 3": "student", b"resume: perhaps": "resume", b'name: "a\\nb"': "name",
}  # fmt: skip
# The `study` section of a small study, and what the message must name.
SECTIONS = {
    "seeds: [1]": "study.seeds", "seeds: no": "whole number", "seeds: -1": "≥ 1", "seeds: 1_0": "whole number", "seeds: '${nosuch}'": "nosuch",
    "seeds: '${study.seeds}'": "study.seeds", "engine: fast": "population, runs", "nosuch: 1": "nosuch", "claim: [x]": "study.claim", "controls: hard": "study.controls",
    "controls: {hard: 1}": "study.controls", "controls: [soft]": "smoothed", "controls: [hard, hard]": "different", "control_smoothing: 1": "< 1",
    "grid: []": "study.grid", "grid: '???'": "??? is no value", "grid: {1: [2]}": "study.grid.1", "grid: '${loss}'": "temperature", "grid: {loss.temperature: []}": "at least one",
    "grid: {loss.temperature: [hot]}": "a number", "grid: {loss.temperature: [true]}": "a number", "grid: {loss.temperature: [0]}": "loss.temperature=0.0", "grid: {loss.temperature: [1, 1.0]}": "given twice",
    "grid: {loss.temperature: [[1]]}": "plain values", "grid: {loss.temperature: {a: {}}}": "is a setting", "grid: {data.verify: [no]}": "true or false", "grid: {loss.temprature: [1]}": "loss.temperature",
    "grid: {seed: [1]}": "study.seeds", "grid: {output: [a]}": "no axis", "grid: {point: {a: {}}}": "study.grid.point", "grid: {a b: {a: {}}}": "study.grid.a b", "grid: {how: {}}": "at least one",
    "grid: {how: {a: [1]}}": "{label: {setting: value}}", "grid: {how: {a: {1: 2}}}": "no such setting", "grid: {how: {a: {loss: nosuch}}}": "nosuch", "grid: {how: {a: {loss.methods: 3}}}": "loss.methods=3",
    "grid: {how: {a: {loss.methods.dkd.weight: -1}}}": "loss.methods.dkd.weight=-1", "grid: {how: {a: {teacher.model_kwargs: {1: 2, b: 3}}}}": "teacher.model_kwargs.1",
    "grid: {how: {a: {loss.methods.dkd: 3, loss.methods.dkd.weight: 1}}}": "keep one", "grid: {loss: [dkd, dkd]}": "given twice", "grid: {loss.kd_weight: [0], loss.ce_weight: [1]}": "control `hard`",
    f"grid: {{loss.temperature: {[*range(1, 102)]}, student.epochs: {[*range(1, 101)]}}}": "≤ 10,000", "contrasts: {}": "study.contrasts", "contrasts: [3]": "study.contrasts[0]",
    "contrasts: [{}]": "the same points", "contrasts: [{nosuch: 1}]": "nosuch", "contrasts: [{a: 3}]": "a", "contrasts: [{a: {loss.temperature: 3}}]": "not in the grid",
    "contrasts: [{a: {how: x}}]": "how", "contrasts: [{a: {seed: 1}}]": "study.seeds", "contrasts: [{metric: test.topp1}]": "test.top1", "contrasts: [{a: {role: hero}}]": "student or teacher",
    "contrasts: [{a: {control: bayes}}]": "not in the grid", f"grid: {{how: {'{a: ' * 25}1{'}' * 25}}}": "deeper than 20",
}  # fmt: skip
SMALL = "name: t\ndata: {{name: digits, family: digits, image_size: 8}}\nteacher: {{model: mlp_tiny}}\nstudent: {{model: mlp_nano}}\nloss: {{temperature: 1.0, kd_weight: 1.0, ce_weight: 0.0}}\nstudy: {{{}}}\n"
# The words after `kd.study recipe=studies/small`, whose grid has two temperatures, and what the message must name.
STUDY_WORDS = {
    "loss.temperature=1,1": "given twice", "loss.temperature=1,2 loss.temperature=4": "given twice", "loss.temperature=1,,2": "cannot be read", "loss.temperature=[1,2]": "a number",
    "loss.temperature=1_0,2": "a number", "loss.temperature=*a,&b": "cannot be read", "loss.temperature=1,${oc.env:HOME}": "references", "data.verify=no,yes": "true or false", "data.verify=on": "true or false",
    "seed=1,2": "study.seeds", "study.seeds=1,2": "no axis", "how=a,b": "how", "loss=dkd,dkd": "given twice", "loss=[dkd": "cannot be read", "hydra.launcher.n_jobs=0": "n_jobs", "hydra.launcher.backend=x": "loky",
    "hydra.launcher.nosuch=1": "nosuch", "name=../x": "plain folder name", "name=link": "link", "output=/dev/null": "output", "output=": "output", "seed=2147483647 study.seeds=2": "< 2147483648", "-m": "many runs by itself",
}  # fmt: skip
# Other commands, and what the message must name.
OTHERS = {
    ("kd.evaluate", "run=nowhere"): "no such folder", ("kd.evaluate", "run=."): "recipe.yaml", ("kd.evaluate", "walk=."): "run=DIR",
    ("kd.probe", "data=mnist9 model=x"): "mnist5k", ("kd.probe", "data=digits"): "model=NAME", ("kd.probe", "data=digits model=x split=all"): "train, val, test",
    ("kd.probe", "data=digits model=x data.image_size=-1"): "≥ 1", ("kd.report", "nowhere"): "no such folder", ("kd.report", ". html=x.txt"): ".html",
    ("kd.evaluate", "run=mutant"): "teacher.last.test.top1", ("kd.evaluate", "run=mutant picture=a.png"): ".svg", ("kd.evaluate", "run=mutant picture=no/a.svg"): "no such directory",
    ("kd.evaluate", "run=mutant picture=folder.svg"): "is a directory",
    ("kd.report", "a\x1bb"): "printable", ("kd.report", "mutant html=folder.html"): "is a directory", ("kd.report", "mutant html=no/x.html"): "no such directory", ("kd.report", "x" * 3000): "2000 bytes",
    ("kd.report", "mutant figures=afile"): "must be a folder", ("kd.report", "mutant mutant"): "one study", ("kd.verify", "verify a\x1bb"): "printable",
    ("kd.verify", "verify nowhere"): "no such file", ("kd.verify", "verify"): "verify PATH", ("kd.checkpoint", "check ."): "verify PATH", ("kd.verify", "verify " + "x" * 3000): "2000 bytes",
    ("kd.study", "recipe=studies/nosuch"): "no such recipe", ("kd.study", "recipe=studies/mnist1d_grid study.seeds=0"): "≥ 1",
    ("kd.study", "recipe=studies/mnist1d_grid study.controls=[soft]"): "hard", ("kd.study", "recipe=studies/mnist1d_grid nosuch=1,2"): "nosuch",
    ("kd.train", "seed=1"): "recipe=NAME", ("kd.train", "recipe=../smoke"): "recipe=", ("kd.train", "recipe=/etc/passwd"): "recipe=",
    ("kd.train", "recipe=folder"): "is no file", ("kd.train", "recipe=fifo"): "is no file",
    ("kd.train", "recipe=studies/mnist1d_grid"): "kd.study",
}  # fmt: skip


def _typed(program: str, words: list[str]) -> tuple[str, object]:
    from accelerate.state import AcceleratorState

    from kd import evaluate, probe, train
    from kd import verify as checkpoint
    from kd.report import __main__ as report
    from kd.study import __main__ as study

    said, before, code = io.StringIO(), sys.argv, 0
    sys.argv = [program, *words]
    mains = {
        "kd.checkpoint": checkpoint.main,
        "kd.evaluate": evaluate.main,
        "kd.probe": probe.main,
        "kd.report": report.main,
        "kd.study": study.main,
        "kd.train": train.main,
        "kd.verify": checkpoint.main,
    }
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), one_line_errors(program):
            code = mains[program](words)
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv = before
        AcceleratorState._reset_state(reset_partial_state=True)
    return said.getvalue(), code


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def _furnish(folder: Path) -> None:
    """What some of the inputs name: a folder and a FIFO called recipes, runs that are links, strangers' results."""
    (folder / "recipes" / "folder.yaml").mkdir(parents=True)
    os.mkfifo(folder / "recipes" / "fifo.yaml")
    (folder / "checkpoints" / "smoke").mkdir(parents=True)
    (folder / "checkpoints" / "smoke" / "link").symlink_to("/")
    for i, content in enumerate(RECIPES):
        (folder / "recipes" / f"bad{i}.yaml").write_bytes(content)
    (folder / "recipes" / "studies").mkdir()
    for i, section in enumerate(SECTIONS):
        grid = "" if section.startswith("grid") else ", grid: {loss.temperature: [1, 4]}"
        (folder / "recipes" / "studies" / f"bad{i}.yaml").write_text(SMALL.format(section + grid))
    (folder / "recipes" / "studies" / "small.yaml").write_text(SMALL.format("grid: {loss.temperature: [1, 4]}"))
    (folder / "checkpoints" / "studies").mkdir()
    (folder / "checkpoints" / "studies" / "link").symlink_to("/")
    for name in ("folder.svg", "folder.html", "mutant", "hostile"):
        (folder / name).mkdir()
    (folder / "afile").touch()
    score = dict.fromkeys(("top1", "nll", "ece", "brier"), 1.0)
    mutant = {"model": "x", "weights": "x", "last": {"val": score, "test": score | {"top1": "high"}}}
    origin = {"recipe_hash": "x", "versions": {}, "hardware": {}}
    (folder / "mutant" / "recipe.yaml").write_text("name: mutant\n")
    (folder / "mutant" / "result.json").write_text(json.dumps({"provenance": origin, "teacher": mutant}))
    (folder / "hostile" / "recipe.yaml").write_text("name: hostile\n")
    (folder / "hostile" / "result.json").write_text(json.dumps({"provenance": "\x1b[2J"}))


def inputs() -> Iterator[tuple[str, str, str]]:
    """Program, words and what the message must name."""
    for words, names in WORDS.items():
        yield "kd.train", words, names
    for i, names in enumerate(RECIPES.values()):
        yield "kd.train", f"recipe=bad{i}", names
    for i, names in enumerate(SECTIONS.values()):
        yield "kd.study", f"recipe=studies/bad{i}", names
    for words, names in STUDY_WORDS.items():
        yield "kd.study", f"recipe=studies/small {words}", names
    for (program, words), names in OTHERS.items():
        yield program, words, names


def told() -> Iterator[tuple[Told, str]]:
    """What every input is told, with what the message must name. Raises AssertionError where something was written."""
    before = Path.cwd()
    contents, sections = list(RECIPES), list(SECTIONS)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _furnish(folder)
        snapshot = _snapshot(folder)
        os.chdir(folder)
        try:
            for program, text, names in inputs():
                plain = text.startswith(("recipe=bad", "replay=")) or program != "kd.train" or (program, text) in OTHERS
                words = text.split() if plain or " " in text else [text]
                message, code = _typed(program, words if plain else ["recipe=smoke", *words])
                assert _snapshot(folder) == snapshot, f"{program} {text[:80]}: wrote something"
                line = f"{program} {text}"
                if "bad" in text and (found := re.fullmatch(r"recipe=(studies/)?bad(\d+)", text)):
                    content = ("study: " + sections[int(found[2])]) if found[1] else contents[int(found[2])]
                    line = f"{program} recipe=FILE with {content!r}"
                yield Told(line, message.replace(f"{folder}/", "").replace(str(folder), "."), code), names
        finally:
            os.chdir(before)


def main() -> None:
    """Print the table."""
    print("| input | message | exit code |\n|---|---|---|")
    for seen, _ in told():
        cells = (plain(text, 160).replace("|", "\\|") for text in (seen.line, seen.message.rstrip("\n")))
        print(f"| `{'` | '.join(cells)} | {seen.code} |")


if __name__ == "__main__":
    main()
