"""Views of real networks: their maps, and an embedding, weight and bias that give the logits back."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import kd.models.networks  # noqa: F401 (registers its names)
from kd.losses.methods import connectors as transforms
from kd.losses.methods import features, relations
from kd.losses.methods.base import Seen
from kd.models.layers import Taps, as_map, classifier_name, list_layers, needed, stages
from kd.models.wrappers import Student, Teacher

K = 7

# name, input, shapes of the default maps for 2 images, embedding
NETWORKS = [
    ("test_resnet", 32, [(32, 16, 16), (32, 8, 8), (48, 4, 4), (192, 2, 2), (96, 1, 1)], 96),
    ("mobilenetv3_small_050", 32, [(16, 16, 16), (8, 8, 8), (16, 4, 4), (24, 2, 2), (288, 1, 1)], 1024),
    ("test_convnext", 32, [(24, 8, 8), (32, 4, 4), (48, 2, 2), (64, 1, 1)], 64),
    ("test_vit", 160, [(64, 10, 10)] * 6, 64),
    ("resnet20_cifar", 32, [(16, 32, 32), (32, 16, 16), (64, 8, 8)], 64),
    ("cnn_small", 32, [(32, 32, 32), (64, 16, 16), (128, 8, 8)], 128),
    ("mlp_small", 32, [(256, 1, 1), (256, 1, 1)], 256),
]


def made(name):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=K)


def pair(student, teacher, *layers):
    return needed({"maps"}, student, teacher, *layers)


def seen_by(student, teacher, x):
    ours, theirs = pair(student, teacher)
    student, teacher = Student(student, features=ours.names), Teacher(teacher, features=theirs.names)
    target = torch.zeros(len(x), dtype=torch.int64)
    views = ours.view(student.model, student(x)), theirs.view(teacher.model, teacher(x))
    return Seen(*views, target, torch.arange(len(x)))


@pytest.mark.parametrize(("name", "side", "shapes", "width"), NETWORKS, ids=[n[0] for n in NETWORKS])
def test_default_view(name, side, shapes, width):
    model = made(name).eval()
    taps, x = Taps(tuple(stages(model)), classifier_name(model)), torch.randn(2, 3, side, side)
    student = Student(model, features=taps.names)
    view = taps.view(model, student(x))
    assert [tuple(m.shape) for m in view.maps] == [(2, *shape) for shape in shapes]
    assert view.embedding.shape == (2, width)
    assert torch.equal(view.logits, model(x))
    torch.testing.assert_close(F.linear(view.embedding, view.weight, view.bias), view.logits)
    assert all(m.requires_grad for m in [*view.maps, view.embedding])


def test_tokens_become_the_grid_of_their_patches():
    """A patch's token goes where the patch is: what the block gives is read off by hand."""
    model = made("test_vit").eval()
    kept = {}
    model.blocks[2].register_forward_hook(lambda module, inputs, output: kept.update(tokens=output))
    taps = Taps(("blocks.2",), classifier_name(model))
    (grid,) = taps.view(model, Student(model, features=taps.names)(torch.randn(1, 3, 160, 160))).maps
    assert model.num_prefix_tokens == 1
    assert torch.equal(grid[0, :, 3, 7], kept["tokens"][0, 1 + 3 * 10 + 7])


def test_channels_last_networks_are_turned():
    class Last(nn.Module):
        output_fmt = "NHWC"

    x = torch.randn(2, 4, 5, 3)
    assert torch.equal(as_map("a", x, Last())[1, 2], x[1, :, :, 2])
    assert torch.equal(as_map("a", x, nn.Module()), x)


def test_an_input_is_what_stands_in_front_of_a_relu_in_place():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    x = torch.randn(5, 4)
    output = Student(model, features=["1:input", "2:input"])(x)
    torch.testing.assert_close(output.features["1:input"], F.linear(x, model[0].weight, model[0].bias))
    torch.testing.assert_close(output.features["2:input"], output.features["1:input"].relu())
    output.features["1:input"].sum().backward()
    assert model[0].weight.grad.any()


def test_stages_pair_by_position_or_by_reduction():
    ours, theirs = pair(made("test_resnet"), made("resnet10t"))
    assert ours.layers == theirs.layers == ("act1", "layer1", "layer2", "layer3", "layer4")
    ours, theirs = pair(made("test_resnet"), made("test_convnext"))
    assert ours.layers == ("layer1", "layer2", "layer3", "layer4")
    assert theirs.layers == ("stages.0", "stages.1", "stages.2", "stages.3")
    ours, theirs = pair(made("test_resnet"), made("test_vit"))
    assert (ours.layers, theirs.layers) == (("layer3",), ("blocks.5",))
    with pytest.raises(ValueError, match=r"teacher stages by \[2, 4, 8, 16, 32\]: none in common; name layers"):
        pair(made("mlp_small"), made("test_resnet"))
    with pytest.raises(ValueError, match="1 student layers and 5 teacher layers"):
        pair(made("test_resnet"), made("resnet10t"), ["layer1"])


def test_what_cannot_be_read_says_why():
    with pytest.raises(ValueError, match="Sequential: does not state its stages"):
        stages(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Sequential: has no get_classifier\(\): give it one"):
        classifier_name(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"get_classifier\(\) gives Identity"):
        classifier_name(timm.create_model("test_resnet", num_classes=0))
    with pytest.raises(ValueError, match="12 tokens are not a grid of 3 x 3"):
        as_map("a", torch.zeros(2, 12, 3), nn.Module())


def test_list_layers_shows_names_that_can_be_tapped():
    model = made("resnet20_cifar")
    layers = list_layers(model, (3, 32, 32))
    assert layers["conv1"] == ("Conv2d", (1, 16, 32, 32))
    assert layers["fc"] == ("Linear", (1, K))
    assert layers["layer2"] == ("Sequential", (1, 32, 16, 16))
    tapped = [name for name, (kind, _) in layers.items() if kind in ("Conv2d", "Sequential", "BasicBlock", "Linear")]
    Student(model, features=tapped)(torch.zeros(1, 3, 32, 32))


ANY = [relations.SP, features.VID, transforms.OFD, transforms.ReviewKD]


@pytest.mark.parametrize("make", ANY)
@pytest.mark.parametrize(("student", "teacher"), [("resnet20_cifar", "resnet32_cifar"), ("mlp_small", "mlp_wide")])
def test_methods_train_from_the_default_layers(make, student, teacher):
    seen = seen_by(made(student), made(teacher), torch.randn(4, 3, 32, 32))
    method = make()
    method.build(seen)
    value = method.evaluate(seen).mean()
    assert value.isfinite()
    gradients = torch.autograd.grad(value, [*seen.student.maps, seen.student.embedding], allow_unused=True)
    assert any(g is not None and bool(g.any()) for g in gradients)
    assert all(g.isfinite().all() for g in gradients if g is not None)
