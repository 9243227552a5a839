"""Networks by name: fitted to the data, with timm's weights or a file's, or one line that says why not."""

import json
import os
import pickle

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from test_wrappers import copied, same

from kd.errors import CheckpointError, ConfigError
from kd.models import Student, Teacher, weights_metadata
from kd.models.factory import build
from kd.models.weights import load_weights

PUBLISHED = "test_resnet.r160_in1k"  # timm's smallest network with weights on the hub
SMALL = {"num_classes": 10, "input_shape": (3, 32, 32)}


# --- which networks


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet10t", (1, 32, 32)),
        ("vit_tiny_patch16_224", (3, 32, 48)),
        ("mlp_tiny", (40,)),
        ("mlp_tiny", (2, 8, 9)),
        ("cnn_small", (1, 28, 28)),
        ("resnet20_cifar", (3, 32, 32)),
    ],
)
def test_build_fits_the_network_to_the_data(name, shape):
    model = build(name, num_classes=6, input_shape=shape)
    assert model.training
    assert model(torch.randn(2, *shape)).shape == (2, 6)


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("resnet20_cifra", {}, "timm and kd know no such network; did you mean resnet20_cifar"),
        ("resnet18", {"input_shape": (40,)}, "mlp_nano, mlp_tiny, mlp_mini, mlp_small and mlp_wide take vectors"),
        ("inception_v3", {}, "fails for inputs of shape (3, 32, 32) (Calculated"),
        ("mlp_tiny", {"model_kwargs": {"dept": 3}}, "student.model_kwargs={'dept': 3}: fails for"),
        ("resnet10t", {"model_kwargs": {"features_only": True}}, "gives list where logits (1, 10) are needed"),
        ("mlp_tiny", {"pretrained": True}, "No pretrained weights exist for mlp_tiny"),
        ("resnet50.a9_in1k", {}, "Invalid pretrained tag (a9_in1k) for resnet50"),
        ("test_vit.r160_in1k", {"pretrained": True}, "cannot be loaded ("),  # not in the hub's cache
        ("local-dir:/no/such", {}, "cannot be loaded (Config file not found"),
    ],
)
def test_build_says_what_cannot_be(name, more, message, hub):
    with pytest.raises(ConfigError) as error:
        build(name, section="student.", **(SMALL | more))
    assert str(error.value).startswith(f"student.model={name}")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- weights of timm


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The weights of PUBLISHED in the hub's cache of a machine without network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    torch.manual_seed(1)
    weights = timm.create_model(PUBLISHED).state_dict()
    directory = tmp_path / "hub" / f"models--timm--{PUBLISHED}"
    (directory / "refs").mkdir(parents=True)
    (directory / "refs" / "main").write_text("0" * 40)
    (directory / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(weights, directory / "snapshots" / ("0" * 40) / "model.safetensors")
    return weights


def test_pretrained_weights_must_fit_the_data(hub):
    with pytest.raises(ConfigError, match=r"its head has 1000 classes, the data has 10; .* teacher\.finetune=true"):
        build(PUBLISHED, num_classes=10, input_shape=(3, 32, 32), pretrained=True)
    with pytest.raises(ConfigError, match=r"its weights are for 3 channels, the data has 1; .* teacher\.finetune=true"):
        build(PUBLISHED, num_classes=1000, input_shape=(1, 32, 32), pretrained=True)
    with pytest.raises(ValueError, match="num_classes=10: the pretrained weights have 1000"):
        Teacher(PUBLISHED, pretrained=True, num_classes=10)  # timm would make a random head
    assert Teacher(PUBLISHED, pretrained=True).model.num_classes == 1000


def test_fine_tuning_replaces_the_head_of_published_weights_only(hub):
    assert same(copied(build(PUBLISHED, num_classes=1000, input_shape=(3, 32, 32), pretrained=True)), hub)
    weights = copied(build(PUBLISHED, num_classes=10, input_shape=(3, 32, 32), pretrained=True, finetune=True))
    assert weights["fc.weight"].shape[0] == 10
    assert same({k: v for k, v in weights.items() if "fc" not in k}, {k: v for k, v in hub.items() if "fc" not in k})


# --- weights of a file


def load(path, name="resnet20_cifar", **more):
    return build(name, **(SMALL | {"checkpoint": path} | more))


@pytest.fixture
def weights():
    return timm.create_model("resnet20_cifar", num_classes=10).state_dict()


@pytest.mark.parametrize("drop_head", [False, True])
def test_fine_tuning_a_checkpoint_replaces_a_head_that_does_not_fit(drop_head, weights, tmp_path):
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    save_file(body if drop_head else weights, tmp_path / "w.safetensors")
    torch.manual_seed(7)
    fresh = copied(build("resnet20_cifar", num_classes=4, input_shape=(3, 32, 32)))
    torch.manual_seed(7)
    tuned = copied(load(tmp_path / "w.safetensors", num_classes=4, finetune=True))
    assert same(tuned, body | {name: fresh[name] for name in ("fc.weight", "fc.bias")})
    if not drop_head:
        assert same(copied(load(tmp_path / "w.safetensors", finetune=True)), weights)  # a head that fits is kept


def without(weights, *names):
    return {name: tensor for name, tensor in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (lambda w: w, {"num_classes": 4}, "its head has 10 classes, the data has 4; in a recipe teacher.finetune=true"),
        (lambda w: without(w, "bn1.bias"), {"finetune": True}, "missing tensors: 1, first bn1.bias"),
        (lambda w: w | {"extra": torch.ones(1)}, {}, "unexpected tensors: 1, first extra"),
        (lambda w: w, {"input_shape": (1, 32, 32)}, "tensors of another shape: 1, first conv1.weight"),
        (lambda w: w | {"bn1.bias": torch.full((16,), torch.inf)}, {}, "NaN or infinite values: 1, first bn1.bias"),
    ],
)
def test_checkpoints_that_do_not_fit(change, more, message, weights, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(change(weights), path)
    with pytest.raises(CheckpointError) as error:
        load(path, **more)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_buffer_may_hold_infinities(tmp_path):
    network = torch.nn.Linear(2, 2)
    network.register_buffer("mask", torch.zeros(2))
    save_file(network.state_dict() | {"mask": torch.tensor([0.0, -torch.inf])}, tmp_path / "w.safetensors")
    load_weights(network, tmp_path / "w.safetensors")
    assert network.mask.tolist() == [0, -torch.inf]


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["KD_TRAP"],)


@pytest.mark.parametrize("wrap", [Teacher, Student])
def test_teacher_and_student_by_name_read_a_file_without_its_code(wrap, weights, tmp_path, monkeypatch):
    torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "w.pth")
    made = wrap("resnet20_cifar", num_classes=10, checkpoint_path=str(tmp_path / "w.pth"))
    assert same(copied(made.model), weights)
    monkeypatch.setenv("KD_TRAP", str(tmp_path / "sprung"))
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="kd runs no code from a file; save the state_dict"):
        wrap("resnet20_cifar", num_classes=10, checkpoint_path=tmp_path / "code.pth")
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(CheckpointError, match="its head has 10 classes"):
        wrap("resnet20_cifar", num_classes=7, checkpoint_path=tmp_path / "w.pth")


def test_metadata_is_read_from_the_header(weights, tmp_path):
    record = {"label_smoothing": "0.1", "smoothing": "uniform"}
    save_file(weights, tmp_path / "w.safetensors", {"kd": json.dumps(record)})
    save_file(weights, tmp_path / "bare.safetensors")
    torch.save(weights, tmp_path / "w.pth")
    assert weights_metadata(tmp_path / "w.safetensors") == record
    assert weights_metadata(str(tmp_path / "bare.safetensors")) == weights_metadata(tmp_path / "w.pth") == {}
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:100])
    for broken in ("torn.safetensors", "none.safetensors"):
        with pytest.raises(CheckpointError, match=f"^{tmp_path / broken}: "):
            weights_metadata(tmp_path / broken)
