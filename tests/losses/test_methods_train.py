"""Every method trains by its name through the one loop; what `loss=NAME` stands for, and a method of one's own."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kd import evaluate
from kd.checkpoint import store
from kd.cli import errors
from kd.config.schema import PACKAGE
from kd.errors import ConfigError
from kd.losses.distill import DistillLoss
from kd.losses.methods import registry as methods
from kd.losses.methods.base import METHODS, Method, Seen, View, Weighted
from kd.training import loop
from kd.training.objective import Objective

EVERY = sorted(methods.names())
SMALL = ("recipe=smoke", "control=false", "run=one")
# Three stages, with as many channels in both networks as fsp wants; maps of 4x4, 2x2 and 1x1.
MAPS = (*SMALL, "teacher.model=cnn_small", "student.model=cnn_small", "data.image_size=4")


def curve(folder, stage="student"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and "loss" in line]


# Every method, in four runs. The last holds those of logits and labels alone.
TOGETHER = [
    ["vid", "ctkd", "online_label_smoothing", "crd"],  # parameters, buffers, a change at the end of an epoch
    ["dml", "hint", "at", "sp", "nst", "fsp", "tf_self"],
    ["reviewkd", "rkd", "mlkd", "simkd", "pkt", "cc", "ofd"],
]
TOGETHER += [[name for name in EVERY if name != "kd" and not any(name in names for names in TOGETHER)]]


# ---- every method


@pytest.mark.parametrize("names", TOGETHER)
def test_every_method_trains_by_its_name(names, kd_train, tmp_path):
    fewer = ["loss.methods.crd.num_negatives=64"] if "crd" in names else []
    done = kd_train(*MAPS, f"loss=[{','.join(names)}]", "output=runs", *fewer)
    assert done.code == 0, done.err
    lines = curve(tmp_path / "runs/smoke/one")
    for name in names:
        assert len({line[name] for line in lines}) == len(lines) > 1, name
        assert all(math.isfinite(line[name]) for line in lines), name
    weights = load_file(tmp_path / "runs/smoke/one/student/last.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_names_are_read_from_the_source_and_all_of_them_are_found():
    assert set(EVERY) == {name for name, method in methods.library().items() if method.__module__.startswith("kd.")}


# ---- what learned parts and gathered state need


MIXED = f"loss=[{','.join(TOGETHER[0])},ofd,simkd]"
MORE = ("student.epochs=2", "train.ema_decay=0.5", "train.accumulation=2", "loss.methods.crd.num_negatives=64")


def test_a_stopped_and_resumed_run_ends_bit_identical(kd_train, monkeypatch, tmp_path):
    assert kd_train(*MAPS, MIXED, *MORE, "output=whole").code == 0
    assert kd_train(*MAPS, MIXED, *MORE, "output=cut", "dry_run=true").code == 0  # leaves nothing behind
    update = loop.Trainer._update
    seen = []

    def counted(self, batches):
        seen.append(self.stage.name)
        return update(self, batches)

    monkeypatch.setattr(loop.Trainer, "_update", counted)
    monkeypatch.setattr(loop, "stop_requested", lambda accelerator: seen.count("student") == 7)
    assert kd_train(*MAPS, MIXED, *MORE, "output=cut").code == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    state = store.load(tmp_path / "cut/smoke/one/student", print).state
    assert {key.split(".")[1] for key in state["objective"]} == set(re.findall(r"\w+", MIXED)) - {"loss"}
    done = kd_train(*MAPS, MIXED, *MORE, "output=cut")
    assert "goes on after update 7 of 10" in done.out
    for name in ("last", "selected"):
        whole, cut = (tmp_path / d / f"smoke/one/student/{name}.safetensors" for d in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()
    for a, b in zip(*(curve(tmp_path / d / "smoke/one") for d in ("whole", "cut")), strict=True):
        assert {**a, "images_per_second": 0} == {**b, "images_per_second": 0}


EQUAL = """
import sys
from accelerate import Accelerator
from kd import train
from kd.cli.errors import one_line_errors
from kd.training import loop
Accelerator.end_training = lambda self: None  # it ends the process group, which the next run of this process needs
fit = loop.Trainer.fit

def checked(self):
    start = {name: p.detach().clone() for name, p in self.stage.objective.named_parameters()}
    fit(self)
    own = dict(self.stage.objective.named_parameters())
    if any(bool((own[name] == start[name]).all()) for name in start):
        raise SystemExit("not learned")
    kept = {n: b for n, b in self.stage.objective.named_buffers() if "running" not in n and "tracked" not in n}
    scored = dict(self._evaluated().named_buffers())
    for name, value in {**dict(self.stage.model.named_parameters()), **own, **kept, **scored}.items():
        sums = self.accelerator.gather(value.double().nan_to_num().abs().sum().view(1))
        if len(sums) != 2 or sums[0] != sums[1]:
            raise SystemExit(f"{name} differs: {sums}")
    if self.accelerator.is_main_process:
        print("equal", self.stage.name, sorted(self.stage.objective.methods), len(kept))

loop.Trainer.fit = checked
with one_line_errors("kd.train"):
    train.main(sys.argv[1:])
"""


@pytest.mark.torture
@pytest.mark.parametrize("names", TOGETHER)
def test_on_two_processes_both_hold_the_same(names, tmp_path):
    """Parameters of the student and of its methods, what these gather, and what is scored. 255 is an uneven share."""
    (tmp_path / "checked.py").write_text(EQUAL)
    words = (*MAPS, "student.epochs=2", "train.batch_size=255", "output=runs", f"loss=[{','.join(names)}]")
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "checked.py")
    done = subprocess.run([sys.executable, *launch, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    gathered = re.findall(rf"equal student {re.escape(str(sorted(names)))} (\d+)", done.stdout)
    assert len(gathered) == 1
    assert names != TOGETHER[0] or gathered == ["7"]


# ---- the objective


class Rows(Method, name="test_rows"):
    """One number an example."""

    needs = frozenset()

    def values(self, seen: Seen) -> torch.Tensor:
        return seen.student.logits.sum(-1)


class Whole(Method, name="test_whole"):
    """One number for a batch."""

    needs = frozenset({"batch"})

    def values(self, seen: Seen) -> torch.Tensor:
        return seen.student.logits.square().mean()


def test_the_objective_is_the_weighted_sum_over_examples():
    torch.manual_seed(0)
    s, t, y = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4), torch.arange(6) % 4
    loss = DistillLoss(temperature=2.0, kd_weight=0.3, ce_weight=0.6, reduction="sum")
    weighted = {"test_rows": Weighted(Rows(), 0.5, 4.0), "test_whole": Weighted(Whole(), 2.0, 0.0)}
    objective = Objective(loss, weighted)
    for epoch, share in ((0.0, 0.0), (1.0, 0.25), (9.5, 1.0)):
        terms = objective(Seen(View(s), View(t), y, epoch=epoch))
        ce = F.cross_entropy(s, y, reduction="sum")
        kd = 4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="sum")
        by_hand = 0.6 * ce + 0.3 * kd + share * 0.5 * s.sum() + 2.0 * 6 * s.square().mean()
        torch.testing.assert_close(terms.loss, by_hand)
        (gradient,), (expected,) = (torch.autograd.grad(value, s) for value in (terms.loss, by_hand))
        torch.testing.assert_close(gradient, expected)
        values = {"ce": ce, "kd": kd, "test_rows": s.sum(), "test_whole": 6 * s.square().mean()}
        assert terms.values.keys() == values.keys()
        for name, value in values.items():
            assert not terms.values[name].requires_grad
            torch.testing.assert_close(terms.values[name], value.detach())


# ---- loss=NAME


def test_a_name_is_written_out_with_every_field():
    dkd = {"weight": 1.0, "warmup_epochs": 20, "tckd_weight": 1.0, "nckd_weight": 8.0, "temperature": 4.0}
    assert methods.section("dkd") == {"methods": {"dkd": dkd}, "kd_weight": 0.0, "ce_weight": 1.0}
    assert methods.section("kd") == {"methods": {}, "kd_weight": 0.9, "ce_weight": 0.1, "temperature": 4.0}
    assert methods.section("mlkd")["methods"]["mlkd"]["temperatures"] == [2.0, 3.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize(
    ("value", "kd_weight", "ce_weight", "names"),
    [
        ("[kd,at]", 0.9, 0.1, ["at"]),
        ("[dkd,rkd]", 0.0, 1.0, ["dkd", "rkd"]),
        ("[label_smoothing,at]", 0.0, 0.0, ["label_smoothing", "at"]),  # it has the cross entropy's place
        ("logit_mse", 0.0, None, ["logit_mse"]),  # its paper names no weights
    ],
)
def test_weights_of_several(value, kd_weight, ce_weight, names):
    section = methods.section(value)
    assert (section["kd_weight"], section.get("ce_weight"), list(section["methods"])) == (kd_weight, ce_weight, names)


def test_every_preset_of_every_method_can_be_built():
    for name in sorted(set(EVERY) - {"kd"}):
        for preset in ("", *methods.library()[name].presets):
            settings = methods.section(f"{name}:{preset}")["methods"]
            assert methods.build(settings)[name].weight == settings[name]["weight"]


def test_later_words_change_single_fields_and_a_recipes_methods_give_way(kd_train, tmp_path):
    (tmp_path / "recipes").mkdir()
    own = "# @package _global_\nname: own\nloss:\n  ce_weight: 1\n  methods:\n    at: {weight: 5, power: 1}\n"
    (tmp_path / "recipes" / "own.yaml").write_text(own)
    out = kd_train("recipe=own", "loss.methods.at.power=2", "--cfg", "job").out
    assert "    at:\n      weight: 5\n      power: 2\n" in out
    words = ("loss.methods.rkd.angle_weight=3", "loss=[rkd,nst]", "loss.methods.nst.weight=7", "loss.ce_weight=0.5")
    out = kd_train("recipe=own", *words, "--cfg", "job").out
    assert "    at: null\n" in out
    assert "  ce_weight: 0.5\n" in out
    assert "      angle_weight: 3\n" in out
    assert "    nst:\n      weight: 7\n" in out


WRONG = {
    "loss=dkd loss.methods.dkd.nkd_weight=1": "loss.methods.dkd.nkd_weight: no such setting; did you mean",
    "loss=fsp": "loss.methods: fsp: compares neighbouring maps: there is 1 map, name 2 or more layers",
    "loss=reviewkd train.batch_size=8 train.accumulation=8": "loss.methods: reviewkd: compares examples",
    "--import nowhere.py": "--import nowhere.py: no such Python file",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_says_what_to_type_before_anything_is_trained(kd_train, tmp_path, line):
    done = kd_train("recipe=smoke", *line.split())
    assert done.code == errors.USAGE
    assert done.err.startswith(f"error: {WRONG[line]}"), done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


WRONG_NAMES = {
    "ddk": "loss=ddk: no such method as 'ddk'; did you mean dkd?",
    "": "loss=: no such method as ''; --help lists them",
    "dkd:cifar": "loss=dkd:cifar: dkd has no preset 'cifar'; its presets: cifar100, imagenet",
    "[dkd,dkd]": "loss=[dkd,dkd]: names dkd twice",
}
WRONG_SETTINGS = [
    (
        {"dist": {"epsilon": 1e-8}},
        "loss.methods.dist.epsilon: has a new name; type released=true for the authors' 1e-8",
    ),
    ({"tf_reg": {"released_code": True}}, "loss.methods.tf_reg.released_code: has a new name; type released"),
    ({"simkd": {"reduction": 4}}, "loss.methods.simkd.reduction: has a new name; type factor"),
    ({"dkd": {"reduction": "sum"}}, "loss.methods.dkd.reduction: no such setting"),
    ({"dkd": {"temprature": 1}}, "loss.methods.dkd.temprature: no such setting; did you mean temperature?"),
    ({"dkd": 1}, "loss.methods.dkd=1: must be settings such as {weight: 1.0}; type loss=dkd"),
    ({"kd": {"weight": 1}}, "loss.methods.kd: is in every loss; type loss.kd_weight=... and loss.temperature=..."),
    ({"dkd": {"temperature": 0}}, "loss.methods.dkd.temperature=0: must be a number from 0.001 to 1000"),
    ({"mlkd": {"temperatures": ["a"]}}, "loss.methods.mlkd.temperatures=['a']: must be a list"),
    ({"lskd": {"settings": {"nckd_weight": 1}}}, "loss.methods.lskd: settings.nckd_weight: kd has only temperature"),
]


@pytest.mark.parametrize("value", WRONG_NAMES)
def test_a_wrong_name_says_what_to_type(value):
    with pytest.raises(ConfigError, match=re.escape(WRONG_NAMES[value])):
        methods.section(value)


@pytest.mark.parametrize(("settings", "says"), WRONG_SETTINGS)
def test_a_wrong_setting_says_what_to_type(settings, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        methods.build(settings)


def test_a_teacher_cannot_be_trained_by_a_method_that_needs_one():
    assert list(methods.build({"maxsup": {}}, "teacher")) == ["maxsup"]
    with pytest.raises(ConfigError, match=r"^teacher.methods.dkd: needs its own teacher; must be one of "):
        methods.build({"dkd": {}}, "teacher")


def test_layers_are_listed_with_their_shapes(kd_train, tmp_path):
    out = kd_train(*MAPS, "list_layers=true").out
    assert re.search(r"  layer2\s+Sequential\s+64 x 2 x 2", out)
    assert re.search(r"  layer2\.0\s+Conv2d\s+64 x 2 x 2", out)
    assert out.count("layer3.2") == 2
    assert not list(tmp_path.iterdir())


# ---- a method of one's own


def test_the_readmes_method_trains_from_one_file(kd_train, tmp_path):
    text = (PACKAGE.parent / "README.md").read_text()
    (code,) = re.findall(r"```python\n# mine.py\n(.*?)```", text, re.DOTALL)
    assert code.count("\n") <= 20
    (tmp_path / "mine.py").write_text(code)
    done = kd_train(*SMALL, "--import", "mine.py", "loss=[mine,kd]", "loss.methods.mine.temperature=2", "output=runs")
    assert done.code == 0, done.err
    assert all(math.isfinite(line["mine"]) for line in curve(tmp_path / "runs/smoke/one"))
    assert "temperature: 2" in (tmp_path / "runs/smoke/one/recipe.yaml").read_text()
    METHODS.pop("mine")  # evaluate has not imported it
    assert evaluate.main([f"run={tmp_path / 'runs/smoke/one'}"]) == 0


def test_an_error_in_ones_own_file_names_its_line(kd_train, tmp_path):
    (tmp_path / "mine.py").write_text("a = 1\nb = a.nothing\n")
    done = kd_train("recipe=smoke", "--import=mine.py")
    says = "error: --import mine.py: AttributeError: 'int' object has no attribute 'nothing' (line 2 "
    assert (done.code, done.err.startswith(says)) == (2, True)


def test_a_recipe_cannot_name_code(kd_train, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "own.yaml").write_text("# @package _global_\nname: own\nimport: mine.py\n")
    assert "own.yaml: import: no such setting" in kd_train("recipe=own").err
