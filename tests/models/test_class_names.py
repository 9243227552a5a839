"""Weights that record the names of their classes: put into the data's order, or refused."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from kd.checkpoint.safetensors_io import save_weights
from kd.errors import ConfigError
from kd.models.classes import recorded, reordered
from kd.models.factory import build

NAMES = ["Bird", "Dog", "ant", "cat"]  # the data's
OTHER_ORDER = ["ant", "Bird", "cat", "Dog"]
SHAPE = {"num_classes": 4, "input_shape": (3, 32, 32)}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def saved(tmp_path):
    """Save a network of seed 0 with these class names; returns its file and its logits."""

    def save(name="resnet20_cifar", names=OTHER_ORDER):
        torch.manual_seed(0)
        network = build(name, **SHAPE).eval()
        save_weights(tmp_path / "w.safetensors", network.state_dict(), {"class_names": names})
        return tmp_path / "w.safetensors", network(IMAGES)

    return save


# a linear head, heads after a norm, of a distilled network, and of one with a convolution
@pytest.mark.parametrize("name", ["resnet20_cifar", "test_vit", "test_convnext", "levit_128s", "test_byobnet"])
def test_outputs_follow_the_datas_order_by_name(saved, name):
    path, logits = saved(name)
    network = build(name, checkpoint=path, class_names=NAMES, **SHAPE)
    assert network.training
    moved = network.eval()(IMAGES)
    for k, label in enumerate(NAMES):
        torch.testing.assert_close(moved[:, k], logits[:, OTHER_ORDER.index(label)])
    said = reordered(recorded(network, path), NAMES)
    assert said.startswith("has the data's classes in another order, first 'ant' for 'Bird'")


def test_equal_names_and_none_change_nothing(saved):
    for path, logits in (saved(names=NAMES), saved(names=[])):
        network = build("resnet20_cifar", checkpoint=path, class_names=NAMES, **SHAPE).eval()
        assert torch.equal(network(IMAGES), logits)
        assert reordered(recorded(network, path), NAMES) == ""


def test_other_names_are_refused_unless_trained_further(saved):
    path, logits = saved(names=["Bird", "Dog", "ant", "emu"])
    with pytest.raises(ConfigError) as error:
        build("resnet20_cifar", checkpoint=path, class_names=NAMES, **SHAPE)
    differ = "it has 'emu', which the data lacks; the data has 'cat', which it lacks"
    said = f"teacher.checkpoint={path}: its weights are for other classes: {differ}; in a recipe teacher.classes=FILE"
    assert str(error.value).startswith(said)
    tuned = build("resnet20_cifar", checkpoint=path, class_names=NAMES, finetune=True, **SHAPE).eval()
    assert torch.equal(tuned(IMAGES), logits)


def test_a_head_that_cannot_be_reordered_is_refused(saved, monkeypatch):
    path, _ = saved()
    monkeypatch.setattr("kd.models.classes.head_keys", lambda model: set())
    with pytest.raises(
        ConfigError, match="the data's classes in another order, and its head is none that kd can reorder"
    ):
        build("resnet20_cifar", checkpoint=path, class_names=NAMES, **SHAPE)


@pytest.mark.parametrize("kind", [list, dict])
def test_label_names_of_a_directory_of_timms_are_names(tmp_path, kind):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=4).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    names = OTHER_ORDER if kind is list else {str(k): name for k, name in enumerate(OTHER_ORDER)}
    cfg = {"input_size": [3, 32, 32], "classifier": "fc", "first_conv": "conv1.0"}
    config = {"architecture": "test_resnet", "num_classes": 4, "label_names": names, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path}"
    moved = build(name, pretrained=True, class_names=NAMES, **SHAPE).eval()
    expected = network(IMAGES)[:, [OTHER_ORDER.index(label) for label in NAMES]]
    torch.testing.assert_close(moved(IMAGES), expected)
    with pytest.raises(ConfigError, match=r"^teacher\.model=local-dir:.* for other classes: it has 'cat'"):
        build(name, pretrained=True, class_names=[*NAMES[:3], "emu"], **SHAPE)
    torch.manual_seed(0)
    start = build(name, class_names=NAMES, **SHAPE).eval()(IMAGES)  # random weights have no classes yet
    torch.manual_seed(0)
    assert torch.equal(start, build(name, **SHAPE).eval()(IMAGES))
