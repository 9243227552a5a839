"""The command line: help without waiting, one line for each mistake, nothing on disk after any of them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from kd.cli import errors
from kd.cli.help import claim
from kd.config import compose
from kd.config import yaml_reader as strict
from kd.config.schema import PACKAGE
from kd.errors import ConfigError


def test_help_lists_every_recipe_with_its_claim_without_importing_torch_or_hydra():
    code = (
        "import sys; sys.argv = ['kd.train', '--help']; from kd import train; train.main(['--help']);"
        "assert not {'torch', 'hydra', 'numpy', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    for name, path in compose.recipe_files().items():
        assert f"  {name} " in done.stdout
        assert claim(path) in done.stdout


def test_cfg_job_prints_the_recipe_with_overrides_and_runs_nothing(kd_train, tmp_path):
    done = kd_train("recipe=resnet50_to_18", "loss.temperature=2", "seed=7", "--cfg", "job")
    assert done.code == 0
    assert "temperature: 2.0" in done.out
    assert "seed: 7" in done.out
    assert "model: resnet50.tv_in1k" in done.out
    assert not list(tmp_path.iterdir())


def test_data_brings_its_schedule_and_the_recipe_has_the_last_word(kd_train):
    imagenet = kd_train("recipe=resnet50_to_18", "data=imagenet", "--cfg", "job").out
    assert "epochs: 100" in imagenet
    assert "image_size: 224" in imagenet
    assert "pretrained: true" in imagenet
    assert "batch_size: 256" in kd_train("recipe=smoke", "data=cifar100", "--cfg", "job").out


WRONG = {
    "seed": "seed: cannot be read; settings are typed key=value, such as seed=VALUE",
    "seed=null": "seed=null: must be a whole number",
    "train.compile=null": "train.compile=null: must be true or false",
    "--resolve": "--resolve: goes with --cfg job",
    "student.layers=[[a]]": "student.layers=[['a']]: must be a list of names",
    "student.layers=[true]": "student.layers=[True]: must be a list of names such as [A,B], numbers inside quotes",
    "scheduler.milestones=[[1]]": "scheduler.milestones=[[1]]: must be a list of whole numbers",
    "scheduler.milestones=[1_0]": "scheduler.milestones=['1_0']: must be a list of whole numbers",
    "scheduler.milestones=['1']": "scheduler.milestones=['1']: must be a list of whole numbers",
    "+teacher.model_kwargs.x=1_0": "+teacher.model_kwargs.x=1_0: is no number with _; type 10, or text inside quotes",
    "loss.methods={dkd:{weight:1}}": "loss.methods: type loss=NAME, or loss=[A,B] for both together",
    "loss.temprature=2": "loss.temprature: no such setting; did you mean loss.temperature?",
    "lr=0.1": "lr: no such setting; did you mean optimizer.lr?",
    "+learning=1": "learning: no such setting; --help lists all",
    "epochs=3": "epochs: no such setting; did you mean teacher.epochs or student.epochs?",
    "student.epochs=1.5": "student.epochs=1.5: must be a whole number ≥ 1",
    "student.epochs=-1": "student.epochs=-1: must be ≥ 1",
    "loss.temperature=0": "loss.temperature=0.0: must be ≥ 0.001 and ≤ 1000",
    "loss.temperature=.nan": "loss.temperature=.nan: must be a number ≥ 0.001 and ≤ 1000",
    "loss.temperature=nan": "loss.temperature=nan: must be finite and ≥ 0.001 and ≤ 1000",
    "loss.temperature=hot": "loss.temperature=hot: must be a number ≥ 0.001 and ≤ 1000",
    "loss.smoothing=both": "loss.smoothing=both: must be one of uniform, others",
    "loss.label_smoothing=1": "loss.label_smoothing=1.0: must be ≥ 0 and < 1",
    "seed=-1": "seed=-1: must be ≥ 0",
    "resume=maybe": "resume=maybe: must be true or false",
    "recipe=resnet50_to_19": "recipe=resnet50_to_19: no such recipe; did you mean recipe=resnet50_to_18?",
    "data=cifar": "data=cifar: no such data set; did you mean data=cifar10?",
    "teacher=resnet50": "teacher=resnet50: is a group of settings; type for example teacher.model=...",
    "dry_run": "dry_run: cannot be read; settings are typed key=value",
    "run=ä": "run=ä: cannot be read; settings are typed key=value",
    "run=a{b": "run=a{b: cannot be read; settings are typed key=value",
    "data.image_size=100000": "data.image_size=100000: must be ≥ 1 and ≤ 4096",
    "data=imagenet": "data.root",
    "data=cifar10 data.root=/nowhere": "data.root=/nowhere",
    "train.batch_size=5000": "train.batch_size=5000: must be ≤ 1293, the training images of digits",
    "train.batch_size=2 train.accumulation=4": "train.batch_size=2: must be ≥ 4",
    "run=": "run=: must not be empty; null, or left out, is none",
    "teacher.checkpoint=": "teacher.checkpoint=: must not be empty; null, or left out, is none",
    "--cfg": "--cfg: type --cfg job",
    "run=../elsewhere": "run='../elsewhere': must be a plain folder name",
    "run=" + "x" * 300: "run='xxx",
    "name=a/b": "name='a/b': must be a plain folder name",
    "name=teachers": "name=teachers: is the folder of trained teachers",
    "output=": "output=: must be a folder",
    "output=/dev/null/x": "output=/dev/null/x: must be a folder that exists or can be made",
    "~seed": "~seed: settings cannot be removed; type seed=VALUE",
    "+seed=1": "seed: is a setting; type seed=VALUE without +",
    "--nosuchflag": "--nosuchflag: no such option; --help lists what there is",
    "recipe=smoke recipe=resnet34_to_18": "recipe=smoke recipe=resnet34_to_18: type one recipe=",
    "teacher.model_kwargs={a:1}": "teacher.model_kwargs: type +teacher.model_kwargs.NAME=VALUE",
    "+student.model_kwargs.nonsense=1": "student.model=mlp_tiny student.model_kwargs={'nonsense': 1}: does not work",
    "scheduler.milestones=[-3,0]": "scheduler.milestones=[-3, 0]: must be rising epochs ≥ 1",
    "scheduler.name=multistep": "scheduler.milestones=[]: must be rising epochs ≥ 1, at least one for multistep",
    "scheduler.milestones=abc": "scheduler.milestones=abc: must be a list of whole numbers such as [30,60]",
    "scheduler.warmup_epochs=1": "scheduler.warmup_epochs=1: must be < student.epochs=1",
    "loss.temperature=inf": "loss.temperature=inf: must be finite and ≥ 0.001 and ≤ 1000",
    "loss.temperature=4,5": "loss.temperature=4,5: is several values; add -m for a run of each, or type one",
    "seed=${foo}": "seed=${foo}: foo: no such setting",
    "data.family=mine": "data.family=mine: must be one of digits, mnist5k",
    "teacher.checkpoint=missing.pth": "teacher.checkpoint=missing.pth: no such file",
    "student.model=resnet19": "student.model=resnet19",
    "loss.kd_weight=0 loss.ce_weight=0": "loss.kd_weight=0 with loss.ce_weight=0 leaves nothing to learn",
    "data=mnist1d data.mixup=0.2": "data.mixup",
    "optimizer.name=adamww": "optimizer.name=adamww",
    "optimizer.name=adahessian": "optimizer.name=adahessian: cannot train here (",  # it needs the gradient's graph
    "optimizer.name=fusedsgd": "optimizer.name=fusedsgd: cannot train here (",  # a package that is not installed
    "optimizer.name=sgdw optimizer.momentum=0": "optimizer.momentum=0: must be > 0 for optimizer.name=sgdw (",
    "student.epochs=99999999999999999999999 dry_run=true": "student.epochs=99999999999999999999999: must be ≥ 1 and ≤",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_line_gets_one_line_that_says_what_to_type(kd_train, tmp_path, line):
    arguments = line.split() if line.startswith("recipe=") else ["recipe=smoke", *line.split()]
    done = kd_train(*arguments)
    assert done.code == errors.USAGE
    assert done.err.startswith(f"error: {WRONG[line]}"), done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["1234e567", "1e5", "1_000", "1.50", "007", "true", "inf", "2026-11-25", "a"])
def test_text_that_looks_like_a_number_is_text(kd_train, text):
    """A short git hash such as 1234e567 was the run `inf`."""
    printed = kd_train("recipe=smoke", f"run={text}", f"data.root={text}", "--cfg", "job").out
    values = strict.parse(printed.encode(), "printed")
    assert (values["run"], values["data"]["root"]) == (text, text)


@pytest.mark.parametrize("text", ["/data/2024_01/w", '"1_0"', "net-1_0", "a_1", "1.5"])
def test_what_has_a_line_and_is_no_number_is_let_through(kd_train, text):
    done = kd_train("recipe=smoke", f"+student.model_kwargs.x={text}", "--cfg", "job")
    assert strict.parse(done.out.encode(), "printed")["student"]["model_kwargs"] == {"x": yaml.safe_load(text)}


@pytest.mark.parametrize("text", ["1_0", "[1_0,20]", "{a:1_0}"])
def test_a_number_with_a_line_is_refused(kd_train, text):
    assert "is no number with _" in kd_train("recipe=smoke", f"+student.model_kwargs.x={text}", "--cfg", "job").err


def test_a_number_for_a_text_in_a_recipe_wants_quotes(kd_train, tmp_path):
    own = tmp_path / "recipes"
    own.mkdir()
    (own / "mine.yaml").write_text("name: mine\nrun: 1e5\n")
    done = kd_train("recipe=mine")
    assert done.code == 2
    assert "mine.yaml: run=100000.0: must be text, numbers inside quotes" in done.err


@pytest.mark.parametrize(("text", "root"), [("1e5", "1e5"), ('"/a #1"', "/a #1"), ("/a#1", "/a#1")])
def test_a_path_that_is_put_in_place_is_the_one_that_was_typed(text, root):
    config = OmegaConf.create({"data": {"root": None}})
    compose.override(config, [f"data.root={text}"])
    assert config.data.root == root


@pytest.mark.parametrize("text", ["/a #1", "[1]#3"])
def test_a_comment_in_a_value_is_refused(text):
    with pytest.raises(ConfigError, match=r"cannot be read; type a plain value, or one inside quotes"):
        compose.override(OmegaConf.create({"data": {"root": None}}), [f"data.root={text}"])


def test_no_recipe_lists_them(kd_train):
    done = kd_train()
    assert done.code == errors.USAGE
    assert done.err.startswith("error: recipe: not given; type recipe=NAME with one of ")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 works on this machine")
def test_fp16_without_a_gpu_says_what_works(kd_train):
    assert "bf16 and fp32 work on a CPU" in kd_train("recipe=smoke", "train.precision=fp16").err


def test_a_recipe_of_ones_own_needs_no_edit_in_kd(kd_train, tmp_path):
    mine = Path("recipes/mine.yaml")
    (tmp_path / "recipes").mkdir()
    (tmp_path / mine).write_text("# @package _global_\n# claim: mine\nname: mine\nloss:\n  temperature: 3\n")
    assert "temperature: 3.0" in kd_train("recipe=mine", "--cfg", "job").out


def test_a_recipe_with_a_misspelt_setting_is_one_line(kd_train, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "odd.yaml").write_text("# @package _global_\nname: odd\nteacher:\n  modle: x\n")
    done = kd_train("recipe=odd")
    assert done.code == errors.USAGE
    assert done.err == "error: recipe/odd: teacher.modle: no such setting; did you mean teacher.model?\n"


def test_a_recipe_that_is_not_text_is_named_and_does_not_stop_help(kd_train, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "bytes.yaml").write_bytes(b"# claim: \xff\xfe\x80")
    assert "bytes.yaml: not a readable recipe" in kd_train("recipe=bytes").err
    assert kd_train("--help").code == 0


def test_an_unreadable_recipe_is_named(kd_train, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "torn.yaml").write_text("name: [")
    done = kd_train("recipe=torn")
    assert done.code == errors.USAGE
    assert "torn.yaml: not a readable recipe" in done.err
    assert kd_train("recipe=smoke", "--cfg", "job").code == 0  # somebody else's mistake stops nobody


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hydra", None)
    monkeypatch.setattr(sys, "argv", ["kd.train", "recipe=smoke"])
    from kd import train

    with pytest.raises(SystemExit) as stop, errors.one_line_errors("kd.train"):
        train.main(["recipe=smoke"])
    assert stop.value.code == errors.USAGE
    assert capsys.readouterr().err == "error: kd.train needs hydra: pip install 'kd-torch[train]'\n"


def test_several_runs_at_once_are_refused_under_torchrun(kd_train, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = kd_train("recipe=smoke", "-m", "seed=0,1")
    assert done.code == errors.USAGE
    assert done.err.startswith("error: -m: starts one run after the other")
