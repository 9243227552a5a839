"""Networks that timm lacks: their sizes and what they compute, against papers and by hand."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import kd.models.networks  # noqa: F401 (registers their names)

# Parameters for 10 classes with the parameter-free shortcuts of He et al. 2016, whose Table 6 rounds them to 0.27,
# 0.46, 0.66, 0.85 and 1.7 M.
OPTION_A = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}
# The two 1x1 convolutions with their BatchNorm, 16 -> 32 and 32 -> 64.
PROJECTIONS = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def perturb(model: nn.Module) -> nn.Module:
    """Give every parameter and buffer a value that its initialisation would not."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) * 0.5 if "var" in name else torch.randn_like(tensor) * 0.02)
    return model


@pytest.mark.parametrize("depth", OPTION_A)
def test_cifar_resnets_have_the_published_size(depth):
    model = timm.create_model(f"resnet{depth}_cifar", num_classes=10)
    assert parameters(model) == OPTION_A[depth] + PROJECTIONS
    weighted = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n]
    assert len(weighted) == depth
    assert timm.create_model(f"resnet{depth}_cifar").num_classes == 100


def resnet_by_hand(weights: dict, depth: int, x: torch.Tensor) -> torch.Tensor:
    def convolve(x, conv, bn, stride=1):
        kernel = weights[f"{conv}.weight"]
        x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
        moments = weights[f"{bn}.running_mean"], weights[f"{bn}.running_var"]
        return F.batch_norm(x, *moments, weights[f"{bn}.weight"], weights[f"{bn}.bias"])

    x = convolve(x, "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for block in range((depth - 2) // 6):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = convolve(x, f"{at}.conv1", f"{at}.bn1", stride).relu()
            y = convolve(y, f"{at}.conv2", f"{at}.bn2")
            shortcut = convolve(x, f"{at}.downsample.0", f"{at}.downsample.1", stride) if stride == 2 else x
            x = (y + shortcut).relu()
    return x.mean((2, 3)) @ weights["fc.weight"].T + weights["fc.bias"]


def test_cifar_resnet_computes_what_the_paper_draws():
    model = perturb(timm.create_model("resnet32_cifar")).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), resnet_by_hand(model.state_dict(), 32, x))
    assert model.forward_features(x).shape == (2, 64, 8, 8)


def test_cifar_resnet_starts_with_the_published_initialisation():
    model = timm.create_model("resnet56_cifar")
    weight = model.layer3[5].conv1.weight
    assert float(weight.detach().std()) == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)  # Kaiming, fan out


def test_mlp_is_affine_maps_with_relu_between():
    model = timm.create_model("mlp_small", in_chans=1, img_size=(1, 6), num_classes=3)
    x = torch.randn(4, 6)
    one, two, head = (m for m in model.modules() if isinstance(m, nn.Linear))
    hidden = (x @ one.weight.T + one.bias).clamp(min=0)
    hidden = (hidden @ two.weight.T + two.bias).clamp(min=0)
    torch.testing.assert_close(model(x), hidden @ head.weight.T + head.bias)
    assert [one.out_features, two.out_features] == [256, 256]


def test_mlp_flattens_images():
    torch.manual_seed(0)
    on_images = timm.create_model("mlp_tiny", in_chans=2, img_size=(3, 5))
    torch.manual_seed(0)
    on_vectors = timm.create_model("mlp_tiny", in_chans=1, img_size=(1, 30))
    x = torch.randn(4, 2, 3, 5)
    torch.testing.assert_close(on_images(x), on_vectors(x.flatten(1)), rtol=0, atol=0)
    assert parameters(timm.create_model("mlp_wide", in_chans=1, img_size=28)) == 785 * 1200 + 1201 * 1200 + 1201 * 10


@pytest.mark.parametrize(("name", "widths"), [("cnn_tiny", (8, 16, 32)), ("cnn_small", (32, 64, 128))])
@pytest.mark.parametrize(("size", "in_chans"), [(28, 1), (32, 3)])
def test_cnn_gives_an_image_the_same_logits_in_every_batch(name, widths, size, in_chans):
    model = timm.create_model(name, in_chans=in_chans).train()
    convolutions = (in_chans * widths[0] + widths[0] * widths[1] + widths[1] * widths[2]) * 9
    assert parameters(model) == convolutions + 2 * sum(widths) + (widths[2] + 1) * 10
    x = torch.randn(8, in_chans, size, size)
    torch.testing.assert_close(model(x)[3:4], model(x[3:4]))
    assert model.forward_features(x).shape == (8, widths[2], size // 4, size // 4)


@pytest.mark.parametrize("name", ["resnet20_cifar", "mlp_tiny", "cnn_small"])
def test_heads_follow_timms_conventions(name):
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.get_classifier().out_features == model.num_classes == 7
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(model(x), model.get_classifier()(before))
    assert before.shape == (2, model.num_features)
    model.reset_classifier(4)
    assert model(x).shape == (2, model.num_classes) == (2, 4)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
