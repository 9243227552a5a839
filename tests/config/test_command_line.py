"""The command line: what words become, and one line for each mistake, with nothing written to disk."""

import os
import re
import subprocess
import sys

import pytest

from kd.cli.errors import USAGE
from kd.config import arguments, compose
from kd.config.schema import PACKAGE, content_hash, identity
from kd.errors import ConfigError
from kd.study.compose import compose as study_compose
from kd.study.grid import Plan


def recipe(*words):
    """The recipe of a command line, composed as kd.train does; of the settings alone where no file is named."""
    settings, _ = arguments.options(words)
    if not any(word.startswith(("recipe=", "data=", "loss=")) for word in settings):
        return compose.build(words=settings)
    return compose.typed(compose.compose(settings))


def command(*words, folder, seconds=60):
    """Run a command in a process of its own."""
    line = [sys.executable, "-m", *words]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, timeout=seconds)


# ---- what words become


def test_the_data_set_brings_a_schedule_which_the_recipe_and_then_the_words_override():
    imagenet = recipe("recipe=resnet50_to_18", "data=imagenet", "data.root=/x")
    assert (imagenet.student.epochs, imagenet.data.image_size, imagenet.teacher.pretrained) == (100, 224, True)
    smoke = recipe("recipe=smoke", "data=digits", "data=cifar100", "seed=7", "seed=8")  # as Hydra takes the last
    assert (smoke.train.batch_size, smoke.data.name, smoke.seed) == (256, "cifar100", 8)


# As they were when the first results were published: a run keeps its directory and its teacher by this hash.
HASHES = {
    ("recipe=smoke",): "99c16ff33db7",
    ("recipe=resnet50_to_18", "data=imagenet", "data.root=/x"): "48e2380cf66b",
    ("recipe=cifar100_resnet56_to_20", "loss=dkd"): "20678c86ef23",
    ("recipe=logit_methods", "loss=[kd,rkd]", "loss.methods.rkd.weight=3"): "2fb455b854aa",
    ("recipe=timm_finetune", "+teacher.model_kwargs.drop_rate=0.1"): "8fdbd3505357",
    ("recipe=resnet34_to_18", "scheduler.milestones=[3,4]", "teacher.members=2", "loss.student_temperature=2",
     "seed=3"): "5a7f5fb7534a",
    ("recipe=smoke", "train.ema_decay=0.9", "train.ema_warmup=false"): "93637fcf2fc3",
}  # fmt: skip


@pytest.mark.parametrize("words", HASHES)
def test_a_recipe_keeps_its_hash(words):
    assert content_hash(identity(recipe(*words))) == HASHES[words]


def test_the_hash_changes_with_what_is_computed_and_not_with_where_it_is_kept():
    base = recipe("seed=0")
    hashes = [content_hash(identity(recipe(*words))) for words in (["output=x", "run=y", "data.workers=9"], ["seed=1"])]
    assert hashes[0] == content_hash(identity(base)) != hashes[1]
    weighted = {content_hash(identity(recipe(f"loss.class_weight={text}"))) for text in ("[1,2]", "[1.0,2e0]", "null")}
    assert len(weighted) == 2
    assert content_hash(identity(recipe())) in weighted
    averages = [recipe("train.ema_decay=0.9", f"train.ema_warmup={warmup}") for warmup in ("true", "false")]
    assert len({content_hash(identity(average)) for average in averages}) == 2


def test_the_saved_recipe_of_an_older_kd_has_no_warmup_of_its_average(tmp_path):
    """It is replayed and evaluated as it was trained."""
    (tmp_path / "recipe.yaml").write_text("name: t\ntrain: {ema_decay: 0.9}\n")
    assert compose.saved_recipe(tmp_path / "recipe.yaml").train.ema_warmup is False


def test_a_reference_takes_the_value_of_another_setting():
    words = ["loss.teacher_smoothing=${teacher.label_smoothing}", "teacher.label_smoothing=.1"]
    assert recipe(*words).loss.teacher_smoothing == 0.1


@pytest.mark.parametrize("text", ["1234e567", "1e5", "1_000", "007", "true", "no", "2026-11-25", "a#b", "run=ä b"])
def test_text_stays_as_it_was_typed(text):
    """A short git hash such as 1234e567 would be infinite as a number."""
    made = recipe(f"run={text}", f"data.root={text}")
    assert (made.run, made.data.root) == (text, text)


def test_a_model_argument_is_read_as_in_a_recipe():
    made = recipe("+student.model_kwargs.a=1e-3", "student.model_kwargs.b=[1, x]", "teacher.layers=[a]")
    assert made.student.model_kwargs == {"a": 0.001, "b": [1, "x"]}
    assert made.teacher.layers == ["a"]


def test_a_sweep_is_the_product_of_its_values_the_last_varying_fastest():
    words = ["recipe=smoke", "loss=kd,[dkd,rkd]", "seed=0,1"]
    assert compose.sweep(words) == [
        ["recipe=smoke", f"loss={loss}", f"seed={seed}"] for loss in ("kd", "[dkd,rkd]") for seed in (0, 1)
    ]


def test_cfg_job_prints_the_resolved_recipe_and_runs_nothing(kd_train, tmp_path):
    done = kd_train("recipe=resnet50_to_18", "train.batch_size=7", "seed=${train.batch_size}", "--cfg", "job")
    assert (done.code, list(tmp_path.iterdir())) == (0, [])
    assert "\nseed: 7\n" in done.out
    assert "model: resnet50.tv_in1k" in done.out


def test_a_recipe_of_ones_own_needs_no_edit_in_kd(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text("name: mine\nloss: {temperature: 3}\n")
    (tmp_path / "recipes/torn.yaml").write_text("name: [")  # which does not stop others
    assert recipe("recipe=mine").loss.temperature == 3
    with pytest.raises(ConfigError, match=r"torn\.yaml: not a readable recipe \(line 1: "):
        recipe("recipe=torn")


# ---- mistakes

WRONG = {
    "seed": "seed: cannot be read; type key=value",
    "--nosuchflag": "--nosuchflag: cannot be read; type key=value without dashes",
    "seed=": "seed: Value '' of type 'str' could not be converted to Integer",
    "seed=1,2": "seed=1,2: is several values; add -m",
    "train.compile=maybe": "train.compile: Value 'maybe' is not a valid bool",
    "train.log_every=1" + 400 * "0" + "e9": "train.log_every: Value 'inf'",
    "loss.temperature=0": "loss.temperature=0.0: must be ≥ 0.001 and ≤ 1000 (divides",
    "loss.temperature=1e999": "loss.temperature=inf: must be ≥ 0.001",
    "teacher.label_smoothing=1": "teacher.label_smoothing=1.0: must be ≥ 0 and < 1",
    "loss.smoothing=both": "loss.smoothing=both: must be one of uniform, others",
    "loss.class_weight=[1,-2]": "loss.class_weight=[1, -2]: must be null, balanced, or a list of numbers from 0 to",
    "teacher.class_weight=even": "teacher.class_weight=even: must be null, balanced, or a list of numbers",
    "loss.temprature=2": "loss.temprature: no such setting; did you mean loss.temperature?",
    "lr=0.1": "lr: no such setting; did you mean optimizer.lr?",
    "epochs=3": "epochs: no such setting; did you mean teacher.epochs or student.epochs?",
    "teacher=resnet50": "teacher: is a group of settings; type for example teacher.model=",
    "student.layers=a": "student.layers: Invalid value assigned: str is not a",
    "scheduler.milestones=[60,30]": "scheduler.milestones=[60, 30]: must be rising epochs ≥ 1",
    "scheduler.milestones=[30": "scheduler.milestones=[30: cannot be read",
    "teacher.model_kwargs={a:1}": "a:1 needs a space after the colon",
    "teacher.checkpoint=": "teacher.checkpoint=: must not be empty",
    "seed=${seed}": "seed: Recursive interpolation detected",
    "seed=${oc.env:HOME}": "${oc.env:HOME} is not read, only references to settings",
    "+teacher.model_kwargs.x={_target_:1}": "_target_",
    "loss.kd_weight=0 loss.ce_weight=0": "loss.kd_weight=0 with loss.ce_weight=0: nothing to learn",
    "loss=dkdd": "loss=dkdd: no such method as 'dkdd'; did you mean dkd?",
    "loss=kd,dkd": "loss=kd,dkd: type one loss=[A,B]",
    "loss.methods.dkd.weight=1": "the recipe does not use dkd; type loss=dkd too",
    "recipe=resnet50_to_19": "recipe=resnet50_to_19: no such recipe; did you mean resnet50_to_18?",
    "recipe=": "recipe: not given; must be one of",
    "data=cifar": "data=cifar: no such data set; did you mean cifar10?",
    "data.omit_class=1 data.label_noise=0.1": "data.omit_class=1 with data.label_noise=0.1: cannot be combined",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_setting_is_one_line_that_says_what_is_allowed(line):
    with pytest.raises(ConfigError) as error:
        recipe(*(["recipe=smoke"] if line.startswith(("data=", "loss=")) else []), *line.split(maxsplit=1))
    assert WRONG[line] in str(error.value)
    assert "\n" not in str(error.value)


# What is found only when the data or the networks are prepared, and what other rooms check.
PREPARED = {
    "data=imagenet": "data.root",
    "train.batch_size=5000": "train.batch_size=5000: must be ≤ 1293",
    "loss.class_weight=[1,2.5]": "loss.class_weight=[1.0, 2.5]: must be 10 numbers, one for each class of digits",
    "run=../elsewhere": "run='../elsewhere': must be a plain",
    "output=": "output=: must be a",
    "teacher.checkpoint=missing.pth": "teacher.checkpoint=missing.pth: no such file",
    "student.model=resnet19": "student.model=resnet19",
    "optimizer.name=adamww": "optimizer.name=adamww",
    "recipe=studies/mnist1d_grid": "is a study; type python -m kd.study",
    "-m seed=0,x": "seed: Value 'x' of type 'str' could not be",
}


@pytest.mark.parametrize("line", PREPARED)
def test_a_command_that_cannot_work_writes_nothing(kd_train, tmp_path, line):
    done = kd_train(*([] if "studies" in line else ["recipe=smoke"]), *line.split())
    assert (done.code, done.err.count("\n"), list(tmp_path.iterdir())) == (USAGE, 1, [])
    assert PREPARED[line] in done.err


STUDY = {
    "seed=1,2": "study.seeds",
    "study.seeds=0": "study.seeds=0: must be ≥ 1",
    "study.controls=[soft]": "hard",
    "loss.temperature=1,1": "loss.temperature",
    "nosuch=1,2": "nosuch: no such setting",
    "-m": "a study is many runs by itself",
    "hydra/launcher=evil": "Could not find 'hydra/launcher/evil'; basic comes",
    "hydra.launcher.nosuch=1": "hydra.launcher.nosuch",
}


@pytest.mark.parametrize("line", STUDY)
def test_a_wrong_study_is_one_line(line):
    with pytest.raises(ConfigError) as error:
        Plan(study_compose(["recipe=studies/mnist1d_grid", *line.split()])[0], lambda data: None)
    assert STUDY[line] in str(error.value)
    assert "\n" not in str(error.value)


# ---- key=value arguments of the other commands


def test_arguments_are_read_by_key():
    words = ["run=a=b", "data.root=/x"]
    assert arguments.read(words, ALLOWED, required=["run"]) == {"run": "a=b", "data.root": "/x"}


ALLOWED = {"run": "DIR", "output": "FILE.html", "data.": "VALUE"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("runn=a", "runn=a: no such argument; type run=DIR"),
        ("a", "a: no such argument; type run=DIR, output=FILE.html, data.KEY=VALUE"),
        ("run=a output=x", "output=x: must end in .html"),
        ("run=", "run=: must not be empty"),
        ("", "run: not given; type run=DIR"),
    ],
)
def test_a_wrong_argument_is_one_line(words, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        arguments.read(words.split(), ALLOWED, required=["run"])


# ---- in a process of its own


@pytest.mark.parametrize("line", ["kd.train recipe=smoke lr=1", "kd.evaluate runn=nowhere", "kd.study lr=1"])
def test_a_command_says_one_line_and_exits_with_2(tmp_path, line):
    done = command(*line.split(), folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_help_fits_two_screens_and_answers_in_under_a_second(tmp_path):
    code = (
        "import sys; from kd import train; train.main(['--help', *sys.argv[1:]]);"
        "assert not {'torch', 'hydra', 'numpy', 'rich'} & set(sys.modules)"
    )
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    after = os.times()  # of processor time: others may share this machine
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 65
    assert max(map(len, lines)) <= 110
    for name in compose.recipe_files():
        assert f"  {name} " in done.stdout
    everything = subprocess.run([sys.executable, "-c", code, "all"], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert "data.crop_pct" in everything.stdout
    assert "data.crop_pct" not in done.stdout
