"""The README is true: its code runs, its commands compose, its tree is the tree."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import torch
from torch import nn

from kd.config import types
from kd.config.schema import PACKAGE
from kd.study import __main__ as study
from kd.study.schema import StudyRecipe

README = (PACKAGE.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.partition("  #")[0].strip()
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if "kd.train" in line or "kd.study" in line
]
STUDIES = [command for command in COMMANDS if "kd.study" in command]
COMMANDS = [command for command in COMMANDS if command not in STUDIES]


def test_the_python_in_the_readme_runs():
    code = [block for language, block in BLOCKS if language == "python" and "in loader" not in block]
    assert code
    for block in code:
        scope: dict = {}
        exec(compile(block, "README.md", "exec"), scope)
        leaf = scope["student"].weight if "student" in scope else scope.get("head")
        assert leaf is None or leaf.grad.abs().sum() > 0


def test_the_loop_in_the_readme_trains_its_student():
    (block,) = (block for language, block in BLOCKS if language == "python" and "in loader" in block)
    assert len([line for line in block.splitlines() if line]) <= 8
    teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer, before = torch.optim.SGD(student.parameters(), lr=0.1), student.weight.clone()
    loader = [(torch.randn(8, 4), torch.randint(3, (8,)))]
    exec(compile(block, "README.md", "exec"), locals() | {"torch": torch})
    assert not torch.equal(student.weight, before)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_training_command_in_the_readme_composes(command, kd_train):
    words = shlex.split(command)
    done = kd_train(*words[words.index("kd.train") + 1 :], *([] if "--help" in words else ["--cfg", "job"]))
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", STUDIES)
def test_every_study_command_in_the_readme_composes(command, monkeypatch, capsys):
    words = shlex.split(command)
    words = words[words.index("kd.study") + 1 :]
    monkeypatch.setattr("sys.argv", ["kd.study", *words])
    if "--help" in words:
        assert study.main(words) == 0
        assert "recipe=studies/" in capsys.readouterr().out
    else:
        composed, *_ = study.compose(words)
        assert composed.name in words[0]


MODULES = sorted(set(re.findall(r"python -m ([\w.]+\w)", README)))


def test_every_module_that_the_readme_runs_is_there():
    assert len(MODULES) > 10
    for name in MODULES:
        assert importlib.util.find_spec(name), name


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("kd.") or "study" in name])
def test_help_of_every_command_says_how_it_is_called(name):
    command = [sys.executable, "-m", name, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m {name}" in done.stdout
    if name in ("kd.train", "kd.study"):  # what scripts and clusters go by
        assert re.search(r"[Ee]xit code.* 0 .* 1 .*2 .* 130 ", done.stdout, re.DOTALL)


def test_the_make_targets_and_the_main_command_are_the_readmes():
    makefile = (PACKAGE.parent / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "python -m kd.train recipe=resnet50_to_18" in makefile
    ci = (PACKAGE.parent / ".ci/run").read_text().splitlines()
    assert [line for line in ci if not line.startswith(("#", "set", "cd"))] == ["make test"]


def test_extras_named_in_the_readme_exist():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    for name, extra in re.findall(r"pip install '?([\w-]+)(?:\[(\w+)\])?", README):
        assert name == project["name"]
        assert not extra or extra in project["optional-dependencies"]


def test_help_shows_every_setting_the_readme_uses():
    used = set(re.findall(r"(?<![.\w])([a-z]+\.[a-z_]+)=", README)) - {"signature"}
    assert used <= set(types.settings(StudyRecipe))
