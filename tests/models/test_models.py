import copy
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import kd.models.networks  # noqa: F401 (registers resnet20_cifar)
from kd.errors import CheckpointError, ConfigError
from kd.models.factory import Student, Teacher, build, weights_metadata

PUBLISHED = "test_resnet.r160_in1k"  # timm's smallest network with weights on the hub


@pytest.fixture
def x():
    return torch.randn(4, 3, 32, 32)


@pytest.fixture
def net():
    """A network whose BatchNorm would move in train mode."""
    return timm.create_model("resnet20_cifar", num_classes=5)


def copied(model: nn.Module) -> dict:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


class Parent(nn.Module):
    def __init__(self, teacher: Teacher, student: Student):
        super().__init__()
        self.teacher, self.student = teacher, student


# --- Teacher


def test_teacher_is_bit_unchanged_by_training_its_parent(net, x):
    teacher = Teacher(net, features=["layer2"])
    parent = Parent(teacher, Student("resnet20_cifar", num_classes=5, features=["layer2"]))
    before, student = copied(teacher.model), copied(parent.student.model)
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        parent.train()
        parent.requires_grad_(True)
        taught, learned = parent.teacher(x), parent.student(x)
        loss = (taught.logits - learned.logits).square().mean()
        loss = loss + (taught.features["layer2"] - learned.features["layer2"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same(copied(teacher.model), before)
    assert not any(torch.equal(parent.student.model.state_dict()[name], student[name]) for name in student)


def test_teacher_is_invisible_to_its_parent(net):
    teacher = Teacher(net)
    parent = Parent(teacher, Student(nn.Linear(2, 2)))
    assert list(teacher.parameters()) == list(teacher.buffers()) == []
    assert not teacher.state_dict()
    assert set(parent.state_dict()) == {"student.model.weight", "student.model.bias"}
    assert len(list(parent.parameters())) == 2
    assert teacher.model is net


@pytest.mark.parametrize("awaken", [lambda t: t.train(), lambda t: nn.Sequential(t).train(), lambda t: t.model.train()])
def test_teacher_stays_in_eval_mode(awaken, net, x):
    teacher = Teacher(net)
    assert not any(module.training for module in (teacher, *net.modules()))
    expected, before = teacher(x).logits, copied(net)
    awaken(teacher)
    assert not teacher.training
    torch.testing.assert_close(teacher(x).logits, expected, rtol=0, atol=0)
    assert same(copied(net), before)
    assert not any(module.training for module in net.modules())


def test_teacher_gives_no_gradient(net, x):
    teacher = Teacher(net, features=["layer3"])
    x.requires_grad_()
    logits, features = teacher(x)
    assert not logits.requires_grad
    assert not features["layer3"].requires_grad
    assert not logits.is_inference()  # those cannot be saved for the student's backward
    teacher.requires_grad_(True)
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("of", [lambda teacher: teacher, lambda teacher: nn.Sequential(teacher)])
def test_conversions_reach_the_teacher(of, net):
    teacher = Teacher(net)
    of(teacher).double()
    assert {t.dtype for t in net.state_dict().values()} == {torch.float64, torch.int64}
    assert teacher(torch.randn(1, 3, 32, 32, dtype=torch.float64)).logits.dtype == torch.float64
    of(teacher).half()
    assert next(net.parameters()).dtype == torch.float16
    of(teacher).to("meta")
    assert {t.device.type for t in net.state_dict().values()} == {"meta"}


def test_teacher_refuses_the_random_head_that_timm_would_make(hub):
    with pytest.raises(ValueError, match="num_classes=10: the pretrained weights have 1000"):
        Teacher(PUBLISHED, pretrained=True, num_classes=10)
    assert Teacher(PUBLISHED, pretrained=True).model.num_classes == 1000


# --- Teacher and Student

BOTH = pytest.mark.parametrize("wrap", [Teacher, Student])


@BOTH
def test_features_are_what_the_modules_give(wrap, net, x):
    wrapped = wrap(net, features=["layer3", "layer1.0.conv1"]).eval()
    logits, features = wrapped(x)
    assert list(features) == ["layer3", "layer1.0.conv1"]
    torch.testing.assert_close(net.forward_head(features["layer3"]), logits, rtol=0, atol=0)
    stem = net.bn1(net.conv1(x)).relu()
    torch.testing.assert_close(features["layer1.0.conv1"], net.layer1[0].conv1(stem), rtol=0, atol=0)
    torch.testing.assert_close(logits, net(x), rtol=0, atol=0)


@BOTH
def test_features_of_a_timm_network_by_name(wrap, x):
    if wrap is Teacher:
        with pytest.warns(UserWarning, match="random weights: pretrained=True"):
            wrapped = wrap("resnet10t", num_classes=3, features=["layer4"])
    else:
        wrapped = wrap("resnet10t", num_classes=3, features=["layer4"]).eval()
    logits, features = wrapped(x)
    torch.testing.assert_close(wrapped.model.forward_head(features["layer4"]), logits, rtol=0, atol=0)


@BOTH
@pytest.mark.parametrize("model", [3, None, lambda x: x, nn.Linear, b"resnet18"])
def test_what_is_no_network_is_named(wrap, model):
    with pytest.raises(TypeError, match=r"must be an nn\.Module or the name of a network") as error:
        wrap(model)
    assert one_line(error).startswith(f"model={model!r}"[:60])


@BOTH
@pytest.mark.parametrize("path", ["", False, 5, b"w.pth"])
def test_what_is_no_path_of_weights_is_no_random_network(wrap, path):
    with pytest.raises(ValueError, match=r"^checkpoint_path=.*: must be the path of a \.safetensors or \.pth file$"):
        wrap("mlp_nano", checkpoint_path=path)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_an_empty_checkpoint_is_no_random_network(role):
    with pytest.raises(ConfigError, match=rf"^{role}\.checkpoint=: must be the path of a \.safetensors or"):
        build("mlp_nano", num_classes=10, input_shape=(64,), role=role, checkpoint="")


def test_a_teacher_without_a_path_is_said_to_be_random():
    with pytest.warns(UserWarning, match="random weights"):
        Teacher("mlp_nano", checkpoint_path=None)


@BOTH
def test_a_file_of_weights_by_name_is_read_by_kd(wrap, net, x, tmp_path):
    torch.save(net.state_dict(), tmp_path / "w.pth")
    made = wrap("resnet20_cifar", num_classes=5, checkpoint_path=str(tmp_path / "w.pth")).eval()
    torch.testing.assert_close(made(x).logits, net.eval()(x), rtol=0, atol=0)
    (tmp_path / "text").write_text("root:x:0:0")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"a": Path("x")}))
    save_file({"a": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file(net.state_dict() | {"fc.bias": torch.full((5,), torch.nan)}, tmp_path / "nan.safetensors")
    said = {"none.safetensors": "no such file", "text": "not a file of weights", "code.pth": "or one that holds code"}
    said |= {"other.safetensors": "does not fit the network", "nan.safetensors": "NaN", ".": "is a folder"}
    for name, message in said.items():
        with pytest.raises(CheckpointError, match=message) as error:
            wrap("resnet20_cifar", num_classes=5, checkpoint_path=tmp_path / name)
        assert one_line(error).startswith(f"{tmp_path / name}: ")
    with pytest.raises(CheckpointError, match=r"tensors of another shape, first fc\.weight"):
        wrap("resnet20_cifar", num_classes=7, checkpoint_path=tmp_path / "w.pth")


def test_student_features_keep_their_graph(net, x):
    student = Student(net, features=["layer1"])
    student(x).features["layer1"].sum().backward()
    assert net.conv1.weight.grad.abs().sum() > 0
    assert net.layer2[0].conv1.weight.grad is None


@BOTH
def test_nothing_is_kept_between_calls(wrap, net, x):
    wrapped = wrap(net, features=["layer1"])
    first = wrapped(x).features["layer1"].clone()
    for _ in range(3):
        features = wrapped(-x).features
    assert not torch.equal(features["layer1"], first)
    net(x)  # past the wrapper
    assert len(net.layer1._forward_hooks) == 1
    assert not wrapped._taps.running


@BOTH
def test_nothing_is_kept_after_a_failure(wrap, net, x):
    wrapped = wrap(net, features=["layer1"])
    with pytest.raises(RuntimeError):
        wrapped(x[:, :2])
    assert not wrapped._taps.running
    assert set(wrapped(x).features) == {"layer1"}


@BOTH
@pytest.mark.parametrize("again", [copy.deepcopy, lambda w: pickle.loads(pickle.dumps(w))])
def test_copies_are_whole_and_independent(wrap, again, net, x):
    wrapped = wrap(net, features=["layer1"]).eval()
    copied = again(wrapped)
    torch.testing.assert_close(copied(x).logits, wrapped(x).logits, rtol=0, atol=0)
    with torch.no_grad():
        copied.model.conv1.weight.zero_()
    assert copied(x).features["layer1"].std((0, 2, 3)).max() < 1e-6 < wrapped(x).features["layer1"].std((0, 2, 3)).max()


@BOTH
def test_compiled_gives_the_same_in_one_graph(wrap, net, x):
    wrapped = wrap(net, features=["layer1", "layer3"]).eval()
    graphs = CompileCounter()  # runs them eagerly
    compiled = torch.compile(wrapped, backend=graphs, fullgraph=True)
    for batch in (x, -x, 2 * x):
        expected, found = wrapped(batch), compiled(batch)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert found.logits.requires_grad == (wrap is Student)
    assert graphs.frame_count == 1


@BOTH
def test_inference_mode_is_allowed(wrap, net, x):
    wrapped = wrap(net, features=["layer1"]).eval()
    expected = wrapped(x).features["layer1"]
    with torch.inference_mode():
        torch.testing.assert_close(wrapped(x).features["layer1"], expected, rtol=0, atol=0)


@BOTH
def test_unknown_feature_names_the_nearest(wrap, net):
    with pytest.raises(ValueError, match=r"features='layer4': no such module; did you mean layer3, layer2, layer1\?"):
        wrap(net, features=["layer4"])


class Odd(nn.Module):
    def __init__(self, gives: str):
        super().__init__()
        self.norm, self.act, self.tuple, self.unused = (
            nn.ReLU(),
            nn.ReLU(inplace=True),
            nn.MaxPool1d(2),
            nn.Linear(2, 2),
        )
        self.tuple.return_indices = True
        self.gives = gives

    def forward(self, x):
        x = self.act(self.norm(x) - 1)
        written = self.act(self.norm(x))
        return {"logits": written} if self.gives == "dict" else written + self.tuple(x)[0].sum()


@pytest.mark.parametrize(
    ("feature", "gives", "message"),
    [
        ("norm", "logits", "features='norm': overwritten in place by a later module"),
        ("tuple", "logits", "features='tuple': the module gives a tuple, not a tensor"),
        ("unused", "logits", "features='unused': the forward pass does not call this module"),
        ("act", "dict", r"the network gives a dict, not logits \(n, k\)"),
    ],
)
def test_features_and_logits_that_would_mislead_are_refused(feature, gives, message):
    with pytest.raises(ValueError, match=message):
        Student(Odd(gives), features=[feature])(torch.randn(2, 4))


def test_create_kwargs_are_for_names(net):
    with pytest.raises(ValueError, match="num_classes: only for networks given by name"):
        Student(net, num_classes=3)


def test_wrapping_a_module_needs_torch_only():
    code = """
import sys
for name in ("timm", "einops", "safetensors", "torchvision", "huggingface_hub"):
    sys.modules[name] = None  # importing it raises
import torch
from kd import Student, Teacher
net = torch.nn.Linear(2, 3)
print(Teacher(net)(torch.ones(1, 2)).logits.shape, Student(net)(torch.ones(1, 2)).logits.shape)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["torch.Size([1,", "3])"] * 2, done.stderr


# --- build: which networks


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet10t", (1, 32, 32)),
        ("vit_tiny_patch16_224", (3, 32, 48)),
        ("levit_128s", (3, 64, 64)),
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


def test_build_passes_model_kwargs_on():
    model = build("resnet10t", num_classes=6, input_shape=(3, 32, 32), model_kwargs={"drop_rate": 0.3})
    assert model.drop_rate == 0.3


SMALL = {"num_classes": 10, "input_shape": (3, 32, 32)}


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        (
            "resnet20_cifra",
            {},
            "student.model=resnet20_cifra: timm and kd know no such network; did you mean resnet20_",
        ),
        ("resnet18.tv_in1kk", {}, "did you mean resnet18.tv_in1k, "),
        ("resnet18", {"input_shape": (40,)}, "mlp_nano, mlp_tiny, mlp_mini, mlp_small and mlp_wide take vectors"),
        ("inception_v3", {}, "student.model=inception_v3: does not work for inputs of shape (3, 32, 32) (Calculated"),
        ("mlp_tiny", {"model_kwargs": {"dept": 3}}, "student.model_kwargs={'dept': 3}: does not work for"),
        ("mlp_tiny", {"model_kwargs": {"num_classes": 3}}, "got multiple values for keyword argument 'num_classes'"),
        ("mlp_tiny", {"model_kwargs": {"checkpoint_path": "x"}}, "got multiple values for keyword argument 'checkp"),
        ("resnet10t", {"model_kwargs": {"features_only": True}}, "gives list where logits (1, 10) are needed"),
        ("mlp_tiny", {"pretrained": True}, "timm has no weights for it; student.pretrained=false starts from random"),
        ("local-dir:/no/such", {}, "student.model=local-dir:/no/such: Config file not found"),
    ],
)
def test_build_says_what_cannot_be(name, more, message, hub):
    with pytest.raises(ConfigError) as error:
        build(name, role="student", **(SMALL | more))
    assert message in one_line(error)


# --- build: weights of timm


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """A machine without network, whose hub cache is an empty folder."""

    def fail(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(no_network):
    """The weights of PUBLISHED in the hub's cache, still without network."""
    torch.manual_seed(1)
    weights = timm.create_model(PUBLISHED).state_dict()
    folder = no_network / f"models--timm--{PUBLISHED}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(weights, folder / "snapshots" / ("0" * 40) / "model.safetensors")
    return weights


@pytest.mark.parametrize(
    ("name", "role", "advice"),
    [
        (PUBLISHED, "teacher", "without network, teacher.checkpoint=/path/to/weights.safetensors"),
        (PUBLISHED, "student", "without network, student.pretrained=false or student.model=local-dir:/path/to/a/f"),
        (f"hf-hub:timm/{PUBLISHED}", "teacher", "without network, teacher.checkpoint=/path/to/weights.safetensors"),
    ],
)
def test_no_network_is_one_line_within_seconds(name, role, advice, no_network, monkeypatch, capfd):
    logger, said, start = logging.getLogger("huggingface_hub"), logging.Handler(), time.perf_counter()
    records: list[logging.LogRecord] = []
    monkeypatch.setattr(said, "emit", records.append)
    monkeypatch.setattr(logger, "handlers", [said])
    logger.setLevel(logging.WARNING)  # the hub's own default
    with pytest.raises(ConfigError) as error:
        build(name, num_classes=1000, input_shape=(3, 32, 32), role=role, pretrained=True)
    assert time.perf_counter() - start < 10  # the hub's client alone takes 45 s
    assert one_line(error).startswith(f"{role}.model={name}: cannot be fetched")
    assert advice in one_line(error)
    assert capfd.readouterr() == ("", "")
    assert not records
    assert (constants.HF_HUB_OFFLINE, logger.level) == (False, logging.WARNING)


def test_pretrained_weights_are_the_published_ones(hub):
    model = build(PUBLISHED, num_classes=1000, input_shape=(3, 32, 32), pretrained=True)
    assert same(copied(model), hub)


def test_pretrained_head_must_fit(hub):
    with pytest.raises(ConfigError) as error:
        build(PUBLISHED, num_classes=10, input_shape=(3, 32, 32), pretrained=True)
    assert one_line(error) == (
        f"teacher.model={PUBLISHED}: its head has 1000 classes, the data has 10: teacher.finetune=true trains a new "
        f"head, or give teacher.checkpoint=/path/to/weights.safetensors of 10 classes"
    )


def test_pretrained_channels_must_fit(hub):
    with pytest.raises(ConfigError) as error:
        build(PUBLISHED, num_classes=1000, input_shape=(1, 32, 32), pretrained=True)
    assert "its weights are for 3 channels, the data has 1: teacher.finetune=true" in one_line(error)


def test_fine_tuning_replaces_the_head_only(hub):
    model = build(PUBLISHED, num_classes=10, input_shape=(3, 32, 32), pretrained=True, finetune=True)
    weights = copied(model)
    assert weights["fc.weight"].shape[0] == 10
    assert same({k: v for k, v in weights.items() if "fc" not in k}, {k: v for k, v in hub.items() if "fc" not in k})


# --- build: weights of a file


def load(path, name="resnet20_cifar", **more):
    return build(name, **(SMALL | {"checkpoint": path} | more))


@pytest.fixture
def weights():
    return timm.create_model("resnet20_cifar", num_classes=10).state_dict()


@pytest.mark.parametrize(
    "dress",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": {f"module.{name}": tensor for name, tensor in weights.items()}},
    ],
)
def test_checkpoints_load_however_they_are_wrapped(dress, weights, tmp_path):
    torch.save(dress(weights), tmp_path / "weights.pth")
    assert same(copied(load(tmp_path / "weights.pth")), weights)


def test_checkpoint_goes_before_pretrained(weights, tmp_path, no_network):
    save_file(weights, tmp_path / "weights.safetensors")
    assert same(copied(load(tmp_path / "weights.safetensors", pretrained=True)), weights)


@pytest.mark.parametrize("drop_head", [False, True])
def test_fine_tuning_a_checkpoint_replaces_a_head_that_does_not_fit(drop_head, weights, tmp_path):
    body = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
    save_file(body if drop_head else weights, tmp_path / "w.safetensors")
    torch.manual_seed(7)
    fresh = copied(build("resnet20_cifar", num_classes=4, input_shape=(3, 32, 32)))
    torch.manual_seed(7)
    found = copied(load(tmp_path / "w.safetensors", num_classes=4, finetune=True))
    assert same(found, body | {name: fresh[name] for name in ("fc.weight", "fc.bias")})


def test_fine_tuning_keeps_a_head_that_fits(weights, tmp_path):
    save_file(weights, tmp_path / "w.safetensors")
    assert same(copied(load(tmp_path / "w.safetensors", finetune=True)), weights)


def without(weights, *names):
    return {name: tensor for name, tensor in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (
            lambda w: w,
            {"num_classes": 4},
            "its head has 10 classes, the data has 4: teacher.finetune=true trains a new",
        ),
        (lambda w: without(w, "fc.weight", "fc.bias"), {}, "2 tensors missing, first fc.weight"),
        (lambda w: without(w, "bn1.bias"), {"finetune": True}, "1 tensors missing, first bn1.bias"),
        (lambda w: w | {"extra": torch.ones(1)}, {}, "1 tensors that the network does not have, first extra"),
        (lambda w: w, {"input_shape": (1, 32, 32)}, "1 tensors of another shape, first conv1.weight"),
        (lambda w: w | {"fc.weight": torch.ones(10, 3)}, {}, "1 tensors of another shape, first fc.weight"),
        (
            lambda w: w | {"bn1.bias": torch.full((16,), torch.nan)},
            {},
            "1 tensors with NaN or infinite values as float32, first bn1",
        ),
        (
            lambda w: w | {"bn1.bias": torch.full((16,), torch.inf)},
            {},
            "1 tensors with NaN or infinite values as float32, first bn1",
        ),
        (
            lambda w: w | {"bn1.running_mean": torch.full((16,), torch.nan)},
            {},
            "infinite values as float32, first bn1.running_mean",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(change, more, message, weights, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(change(weights), path)
    with pytest.raises(ConfigError) as error:
        load(path, **more)
    assert one_line(error).startswith(f"teacher.checkpoint={path}: ")
    assert message in one_line(error)


class Trap:
    def __reduce__(self):
        return os.mkdir, (os.environ["KD_TRAP"],)


@pytest.mark.parametrize(
    ("file", "write", "message"),
    [
        ("none.pth", lambda path: None, "no such file; give the path of a .safetensors or .pth file"),
        ("folder", lambda path: path.mkdir(), "is a folder; give the path of a .safetensors or .pth file"),
        ("empty.safetensors", lambda path: path.touch(), ": is empty"),
        ("text.safetensors", lambda path: path.write_text("hello\n" * 9), "not a readable .safetensors file"),
        ("text.pth", lambda path: path.write_text("hello\n" * 9), "not a file of weights"),
        ("half.pth", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "not a file of weights"),
        ("list.pth", lambda path: torch.save([torch.ones(1)], path), "not a file of weights"),
        ("plain.pth", lambda path: torch.save({"lr": 0.1}, path), "holds no state_dict of tensors"),
        ("nothing.pth", lambda path: torch.save({}, path), "holds no state_dict of tensors"),
        ("code.pth", lambda path: torch.save({"model": Trap()}, path), "or one that holds code, which kd never runs"),
    ],
)
def test_files_that_are_no_weights(file, write, message, tmp_path, monkeypatch):
    path = tmp_path / file
    monkeypatch.setenv("KD_TRAP", str(tmp_path / "sprung"))
    write(path)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert one_line(error).startswith(f"teacher.checkpoint={path}: ")
    assert message in one_line(error)
    assert not (tmp_path / "sprung").exists()


def test_metadata_is_read_from_the_header(weights, tmp_path):
    record = {"label_smoothing": "0.1", "smoothing": "uniform"}
    save_file(weights, tmp_path / "w.safetensors", {"kd": json.dumps(record)})
    save_file(weights, tmp_path / "bare.safetensors")
    torch.save(weights, tmp_path / "w.pth")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:100])
    assert weights_metadata(tmp_path / "w.safetensors") == record
    assert weights_metadata(str(tmp_path / "bare.safetensors")) == weights_metadata(tmp_path / "w.pth") == {}
    said = {"torn.safetensors": "not a readable .safetensors file", "none.safetensors": "no such file"}
    for broken, message in (said | {"none.pth": "no such file", "none": "no such file", ".": "is a folder"}).items():
        with pytest.raises(CheckpointError) as error:
            weights_metadata(tmp_path / broken)
        assert one_line(error).startswith(f"{tmp_path / broken}: {message}")
