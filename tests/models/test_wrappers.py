"""Teacher and Student: a teacher that nothing trains, and features by the names of modules."""

import os
import pickle
import subprocess
import sys
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import kd.models.networks  # noqa: F401 (registers resnet20_cifar)
from kd.models.wrappers import Student, Teacher


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


# --- Teacher


def test_teacher_is_bit_unchanged_by_training_its_parent(net, x):
    teacher = Teacher(net, features=["layer2"])
    parent = nn.ModuleList([teacher, Student("resnet20_cifar", num_classes=5, features=["layer2"])])
    before, student = copied(teacher.model), copied(parent[1].model)
    optimizer = torch.optim.SGD(parent.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        parent.train()
        parent.requires_grad_(True)
        taught, learned = parent[0](x), parent[1](x)
        loss = (taught.logits - learned.logits).square().mean()
        loss = loss + (taught.features["layer2"] - learned.features["layer2"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert same(copied(teacher.model), before)
    assert not any(torch.equal(parent[1].model.state_dict()[name], student[name]) for name in student)


def test_teacher_is_invisible_to_its_parent(net):
    parent = nn.ModuleList([Teacher(net), Student(nn.Linear(2, 2))])
    assert list(parent[0].parameters()) == list(parent[0].buffers()) == []
    assert set(parent.state_dict()) == {"1.model.weight", "1.model.bias"}


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
def test_nothing_is_kept_between_calls(wrap, net, x):
    wrapped = wrap(net, features=["layer1"])
    first = wrapped(x).features["layer1"].clone()
    for _ in range(3):
        features = wrapped(-x).features
    assert not torch.equal(features["layer1"], first)
    net(x)  # past the wrapper
    assert len(net.layer1._forward_hooks) == 1
    assert wrapped._hooks.kept is None


@BOTH
def test_a_pickled_copy_is_whole_and_independent(wrap, net, x):
    wrapped = wrap(net, features=["layer1"]).eval()
    copied = pickle.loads(pickle.dumps(wrapped))
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
def test_unknown_feature_names_the_nearest(wrap, net):
    with pytest.raises(ValueError, match=r"features='layer4': no such module; did you mean layer3, layer2, layer1\?"):
        wrap(net, features=["layer4"])


class Odd(nn.Module):
    def __init__(self, gives: str):
        super().__init__()
        self.norm, self.act, self.unused = nn.ReLU(), nn.ReLU(inplace=True), nn.Linear(2, 2)
        self.tuple = nn.MaxPool1d(2, return_indices=True)
        self.gives = gives

    def forward(self, x):
        x = self.act(self.norm(x) - 1)
        written = self.act(self.norm(x))
        return {"logits": written} if self.gives == "dict" else written + self.tuple(x)[0].sum()


@pytest.mark.parametrize(
    ("feature", "gives", "message"),
    [
        ("norm", "logits", "features='norm': overwritten in place by a later module"),
        ("tuple", "logits", "features='tuple': the module gives a tuple"),
        ("unused", "logits", "features='unused': the forward pass does not call this module"),
        ("act", "dict", "the network gives a dict"),
    ],
)
def test_features_and_logits_that_would_mislead_are_refused(feature, gives, message):
    with pytest.raises(ValueError, match=message):
        Student(Odd(gives), features=[feature])(torch.randn(2, 4))


# --- inputs and outputs as networks have them


class ModelOutput(OrderedDict):
    """As in transformers: a dict whose entries are attributes too."""

    def __getattr__(self, name):
        return self[name]


class Classifier(nn.Module):
    """Called as networks of transformers are: everything by keyword, and an output with `logits`."""

    def __init__(self):
        super().__init__()
        self.dense, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, values=None, mask=None):
        hidden = self.dense(input=values if mask is None else values * mask)
        return ModelOutput(hidden=hidden, logits=self.head(hidden))


@BOTH
def test_keyword_arguments_and_an_output_with_logits(wrap):
    network, values, mask = Classifier(), torch.randn(2, 4), torch.tensor([1.0, 0, 1, 1])
    hidden = network.dense(values * mask)
    wrapped = wrap(network, features=["dense", "dense:input"])
    logits, features = wrapped(values, mask=mask)
    torch.testing.assert_close(logits, network.head(hidden), rtol=0, atol=0)
    torch.testing.assert_close(features["dense"], hidden, rtol=0, atol=0)
    torch.testing.assert_close(features["dense:input"], values * mask, rtol=0, atol=0)
    torch.testing.assert_close(wrapped(mask=mask, values=values).logits, logits, rtol=0, atol=0)
    assert logits.requires_grad == (wrap is Student)


class Sum(nn.Module):
    """A network of two inputs, which it takes as a list or as a dict."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, inputs):
        left, right = inputs.values() if isinstance(inputs, dict) else inputs
        return self.left(left) + self.right(right)


@BOTH
def test_a_list_or_a_dict_reaches_the_network_as_it_is(wrap):
    network, left, right = Sum(), torch.randn(2, 4), torch.randn(2, 2)
    expected = network.left(left) + network.right(right)
    wrapped = wrap(network)
    torch.testing.assert_close(wrapped([left, right]).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(wrapped({"left": left, "right": right}).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(wrapped(inputs=[left, right]).logits, expected, rtol=0, atol=0)


@BOTH
def test_a_network_of_transformers(wrap):
    """An image classifier and a text classifier, called by keyword with the batch of a processor."""
    transformers = pytest.importorskip("transformers", reason="transformers is not among kd's dependencies")
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**size, image_size=16, patch_size=8, num_labels=5)
    images = torch.randn(2, 3, 16, 16)
    vit = transformers.ViTForImageClassification(config).eval()
    logits, features = wrap(vit, features=["classifier:input"])(pixel_values=images)
    torch.testing.assert_close(logits, vit(images).logits, rtol=0, atol=0)
    torch.testing.assert_close(vit.classifier(features["classifier:input"]), logits, rtol=0, atol=0)
    config = transformers.BertConfig(**size, vocab_size=11, num_labels=5)
    batch = {"input_ids": torch.tensor([[1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    bert = transformers.BertForSequenceClassification(config).eval()
    torch.testing.assert_close(wrap(bert)(**batch).logits, bert(**batch).logits, rtol=0, atol=0)


def test_a_teacher_without_weights_is_said_to_be_random():
    with pytest.warns(UserWarning, match="random weights: pass pretrained=True"):
        Teacher("mlp_nano")


def test_what_is_no_network_is_named(net):
    with pytest.raises(TypeError, match=r"^model: must be an nn\.Module"):
        Student(nn.Linear)
    with pytest.raises(ValueError, match="num_classes: allowed only if model is a name"):
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
