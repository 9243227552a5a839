"""Networks of one's own file, teacher.model=FILE.py:NAME, and paths with characters that mean something elsewhere."""

from functools import partial

import pytest
import yaml
from safetensors.torch import load_file, save_file

from kd import evaluate, probe
from kd.runtime import own_code

NETWORKS = """
from collections import namedtuple
from pathlib import Path

import torch
from torch import nn

Path("imported").touch()
Output = namedtuple("Output", "logits")


class Net(nn.Module):
    def __init__(self, num_classes, width=8):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, width), nn.Linear(width, num_classes)

    def forward(self, images):
        return Output(self.head(self.hidden(images.flatten(1)).relu()))


def ten():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def three():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))


def nothing():
    return None
"""
SMOKE = ("recipe=smoke", "output=runs = #1", "run=a #=1 b", "train.batch_size=200")
NAMED = ("teacher.model=my nets.py:Net", "+teacher.model_kwargs.width=48", "student.model=my nets.py:ten")


@pytest.fixture
def kd_evaluate(called):
    return partial(called, "kd.evaluate", evaluate.main)


@pytest.fixture(autouse=True)
def nobody_imported(monkeypatch):
    monkeypatch.setattr(own_code, "_IMPORTED", {})


@pytest.fixture
def networks(kd_train, tmp_path):
    """A file with networks, in the current directory."""
    path = tmp_path / "my nets.py"
    path.write_text(NETWORKS)
    return path


def test_networks_of_ones_own_file_train_and_are_scored_and_probed(networks, kd_train, kd_evaluate, called, tmp_path):
    done = kd_train(*SMOKE, *NAMED)
    assert done.code == 0, done.err
    run = tmp_path / "runs = #1/smoke/a #=1 b"
    weights = next((tmp_path / "runs = #1/teachers").glob("*/last.safetensors"))
    assert load_file(weights)["hidden.weight"].shape == (48, 64)
    assert set(load_file(run / "student/last.safetensors")) == {"1.weight", "1.bias"}
    own_code._IMPORTED.clear()  # as in a new process
    refused = kd_evaluate(f"run={run}")
    assert (refused.code, "type --import my nets.py if you trust" in refused.err) == (2, True)
    scored = kd_evaluate(f"run={run}", "--import", networks)
    assert scored.code == 0, scored.err
    own_code._IMPORTED.clear()
    replayed = kd_train(f"replay={run}", "--import", networks)
    assert (replayed.code, "weights  identical" in replayed.out) == (0, True), replayed.err
    own_code._IMPORTED.clear()
    words = ("data=digits", f"checkpoint={weights}", "teacher.model_kwargs.width=48")
    probed = called("kd.probe", probe.main, *words)
    assert "records model='my nets.py:Net'; type it as model=NAME if you trust it" in probed.err
    assert not own_code._IMPORTED
    probed = called("kd.probe", probe.main, *words, "model=my nets.py:Net")
    assert "recorded  0.0 (uniform)" in probed.out, probed.err


def test_a_recipe_or_a_file_of_weights_imports_nothing(networks, kd_train, tmp_path):
    (tmp_path / "recipes").mkdir()
    own = {"name": "mine", "teacher": {"model": "my nets.py:Net"}, "student": {"model": "mlp_tiny"}}
    (tmp_path / "recipes/mine.yaml").write_text(yaml.safe_dump(own))
    done = kd_train("recipe=mine", "teacher.epochs=1", "student.epochs=1")
    says = "teacher.model=my nets.py:Net: only the command line imports code; type --import my nets.py if you trust it"
    assert (done.code, says in done.err) == (2, True)
    assert not (tmp_path / "imported").exists()


def test_a_changed_file_is_another_run(networks, kd_train):
    assert kd_train(*SMOKE, *NAMED, "control=false").code == 0
    networks.write_text(NETWORKS.replace("relu()", "tanh()"))
    done = kd_train(*SMOKE, *NAMED, "control=false")
    assert (done.code, "holds another recipe (weight_files." in done.err) == (2, True)


def test_a_feature_method_says_what_a_network_needs(networks, kd_train):
    done = kd_train(*SMOKE, *NAMED, "loss=rkd")
    says = "Sequential: has no get_classifier(): give it one that returns the linear layer of its logits"
    assert (done.code, says in done.err) == (2, True), done.err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.py:Net", "--import none.py: no such Python file"),
        ("my nets.py:Nett", "has no function or class Nett"),
        ("my nets.py:three", "gives (1, 3) where logits (1, 10) are needed"),
        ("my nets.py:nothing", "gives a NoneType: must be an nn.Module"),
    ],
)
def test_what_gives_no_network_for_the_data_is_one_line(name, says, networks, kd_train):
    done = kd_train(*SMOKE, f"student.model={name}")
    assert (done.code, says in done.err, done.err.count("\n")) == (2, True, 1), done.err


def test_a_teacher_with_weights_of_its_own_is_used_as_it_is(networks, kd_train, tmp_path):
    kd_train(*SMOKE, "teacher.model=my nets.py:ten", "control=false")
    weights = next((tmp_path / "runs = #1/teachers").glob("*/last.safetensors"))
    save_file(load_file(weights), tmp_path / "w = #1.safetensors")
    load = "from safetensors.torch import load_file\n\ndef loaded():\n    net = ten()\n    "
    networks.write_text(f'{NETWORKS}\n{load}net.load_state_dict(load_file("w = #1.safetensors"))\n    return net\n')
    ways = (
        ("teacher.model=my nets.py:loaded", "teacher.pretrained=true", "run=own"),
        ("teacher.model=my nets.py:ten", "teacher.checkpoint=w = #1.safetensors", "run=file"),
    )
    for words in ways:
        done = kd_train(*SMOKE, "control=false", *words)
        assert done.code == 0, done.err
        # kd's weights record how their images are made; of those that the file loads nobody knows it.
        assert ("warning  my nets.py:loaded takes images as the data set's" in done.out) == (words[-1] == "run=own")
    own, file = (load_file(tmp_path / f"runs = #1/smoke/{run}/student/last.safetensors") for run in ("own", "file"))
    assert all(own[name].equal(file[name]) for name in file)
