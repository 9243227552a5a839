"""Data sets held in memory: normalisation, augmentation that belongs to the sample, and its random numbers."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pictures import everything, rng_state

from kd.config.schema import DataConfig
from kd.data import load_data
from kd.data.sample_rng import bits, global_rng, normals, sample_keys, uniforms
from kd.data.small_sets import _mnist1d
from kd.data.tensors import channel_statistics
from kd.errors import ConfigError


def config(**settings):
    return DataConfig(**{"image_size": 8, **settings})


@pytest.fixture(scope="module", autouse=True)
def _signals_are_generated_without_a_trace():
    _mnist1d.cache_clear()
    random.seed(123), np.random.seed(123)  # an earlier test may have left what generating again would leave
    before = rng_state()
    load_data(config(family="mnist1d"), 0)
    assert rng_state() == before


def test_sizes_and_content_of_the_embedded_sets():
    mnist, signals = load_data(config(family="mnist5k", image_size=28), 0), load_data(config(family="mnist1d"), 0)
    assert [len(s) for s in (mnist.train, mnist.val, mnist.test)] == [3600, 400, 1000]
    assert mnist.train.images.dtype == torch.uint8
    # the whole MNIST training set has mean 0.1307 and deviation 0.3081
    assert mnist.mean == pytest.approx([0.1307], abs=2e-3)
    assert mnist.std == pytest.approx([0.3081], abs=2e-3)
    assert [len(s) for s in (signals.train, signals.val, signals.test)] == [3600, 400, 1000]
    assert signals.input_shape == (40,)
    pooled = torch.cat([s.images for s in (signals.train, signals.val, signals.test)])
    assert pooled.double().std(correction=0).item() == pytest.approx(1, abs=1e-6)  # as its authors standardise it


# --- views


def test_training_images_are_normalised_to_mean_0_and_deviation_1():
    for data in (load_data(config(), 0), load_data(config(family="mnist1d"), 0)):
        images = everything(data.train, None)[0].double()
        assert images.mean().item() == pytest.approx(0, abs=1e-6)
        assert images.std(correction=0).item() == pytest.approx(1, abs=1e-6)


def test_channels_are_normalised_apart_and_in_parts():
    images = torch.randint(0, 256, (5000, 3, 2, 2), dtype=torch.uint8) // torch.tensor([1, 2, 4]).view(3, 1, 1)
    mean, std = channel_statistics(images.to(torch.uint8))  # 5,000 is more than the 4,096 of one part
    plain = images.double().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, plain.mean(1))
    torch.testing.assert_close(std, plain.std(1, correction=0))


def test_the_evaluation_view_is_the_stored_image_normalised_and_resized():
    data = load_data(config(image_size=16, shift=2, hflip=0.5, noise=0.3), 0)
    pixels = (data.test.images.double() - data.mean[0]) / data.std[0]
    expected = F.interpolate(pixels.float(), size=16, mode="bilinear")  # antialias changes nothing where images grow
    torch.testing.assert_close(everything(data.test, None)[0], expected, rtol=0, atol=1e-5)


def test_shrinking_averages_pixels():
    data = load_data(config(family="mnist5k", image_size=14), 0)
    images = everything(data.test, None)[0]
    full = everything(load_data(config(family="mnist5k", image_size=28), 0).test, None)[0]
    assert images.shape[1:] == (1, 14, 14)
    # plain bilinear reads 4 pixels per place here, and is F.avg_pool2d(2); antialiased reads a triangle of 4 x 4
    one_axis = torch.tensor([1, 3, 3, 1]) / 8
    kernel = torch.outer(one_axis, one_axis)[None, None]
    expected = F.conv2d(full, kernel, stride=2, padding=1)
    torch.testing.assert_close(images[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=0, atol=1e-4)


def shifted_by_hand(image, dy, dx):
    """What numpy says a shift is: rows and columns that leave are lost, those that come in are 0."""
    height, width = image.shape[-2:]
    out = np.zeros_like(image)
    for y in range(height):
        for x in range(width):
            if 0 <= y - dy < height and 0 <= x - dx < width:
                out[..., y, x] = image[..., y - dy, x - dx]
    return out


@pytest.mark.parametrize(("family", "shift", "rows"), [("digits", 1, (-1, 0, 1)), ("mnist1d", 3, (0,))])
def test_training_samples_are_stored_ones_shifted_by_every_offset(family, shift, rows):
    data = load_data(config(family=family, shift=shift), 3)
    images, targets = everything(data.train, 0)
    assert torch.equal(targets, data.train.targets)
    places = [(dy, dx) for dy in rows for dx in range(-shift, shift + 1)]  # a signal is an image one pixel high
    offsets = []
    for stored, seen in zip(data.train.images.numpy()[:300], images.numpy(), strict=False):
        moved = {place: shifted_by_hand(np.atleast_2d(stored), *place) for place in places}
        error = {o: np.abs((image - data.mean[0]) / data.std[0] - seen).max() for o, image in moved.items()}
        offsets.append(min(error, key=error.get))
        assert error[offsets[-1]] < 1e-5
    counts = np.unique(offsets, axis=0, return_counts=True)[1]
    assert len(counts) == len(places)
    assert counts.min() > 300 / len(places) / 2


def test_flips_mirror_the_share_of_images_that_is_asked_for():
    data = load_data(config(hflip=0.25), 0)
    plain, seen = everything(data.train, None)[0], everything(data.train, 0)[0]
    flipped = torch.tensor([torch.equal(s, p.flip(-1)) for s, p in zip(seen, plain, strict=True)])
    same = torch.tensor([torch.equal(s, p) for s, p in zip(seen, plain, strict=True)])
    assert (flipped | same).all()
    assert flipped.double().mean().item() == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("family", ["digits", "mnist1d"])
def test_noise_is_gaussian_of_the_given_size_and_moves_nothing_else(family):
    data = load_data(config(family=family, shift=2, noise=0.3), 0)
    clean = load_data(config(family=family, shift=2), 0)
    noise = (everything(data.train, 5)[0] - everything(clean.train, 5)[0]).double() / 0.3
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    assert noise.pow(4).mean().item() == pytest.approx(3, abs=0.1)


AUGMENTED = {"shift": 2, "hflip": 0.5, "noise": 0.2}


@pytest.mark.parametrize("settings", [{}, {"shift": 1}, {"hflip": 0.5}, {"noise": 0.1}])
def test_a_split_says_whether_its_views_differ_between_epochs(settings):
    """A study reads it: what a teacher says of an image can be kept only where the image stays the same."""
    split = load_data(config(**settings), 0).train
    assert split.augments == (not torch.equal(everything(split, 0)[0], everything(split, 1)[0])) == bool(settings)


@pytest.mark.parametrize("settings", [AUGMENTED, {"family": "mnist1d", "shift": 4, "noise": 0.2}])
def test_a_sample_looks_the_same_in_any_batch_order_and_process(settings):
    split = load_data(config(**settings), 7).train
    together = everything(split, 4)[0]
    assert torch.equal(together, everything(split, 4, size=7)[0])
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    shards = [order[rank::3] for rank in range(3)]
    for shard in shards:  # three processes, each from the middle of the epoch on
        for batch in split.batches(list(shard.split(50))[2:], 4):
            assert torch.equal(batch.images, together[batch.index])
            assert torch.equal(batch.targets, split.targets[batch.index])


def test_augmentation_differs_between_epochs_samples_and_seeds():
    split, other = (load_data(config(**AUGMENTED), seed).train for seed in (0, 1))
    first = everything(split, 0)[0]
    for images in (everything(split, 1)[0], everything(other, 0)[0]):
        assert not (first == images).flatten(1).all(1).any()


# --- random numbers of a sample


def test_the_hash_is_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(x) % 2**64 for x in bits(torch.tensor([1234567]), 4)[0]] == published


def test_uniforms_are_uniform_and_normals_normal():
    from scipy import stats

    keys = sample_keys(0, 0, torch.arange(5000))
    u = uniforms(keys, 3)
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.flatten().double(), "uniform").pvalue > 1e-3
    z = normals(keys, 5)
    assert z.shape == (5000, 5)
    assert stats.kstest(z.flatten().double(), "norm").pvalue > 1e-3
    assert torch.corrcoef(z.T).fill_diagonal_(0).abs().max() < 0.06


def test_global_rng_seeds_inside_and_restores_outside_even_after_an_error():
    before = rng_state()
    draws = []
    for _ in range(2):
        with global_rng(2**62):
            draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    with pytest.raises(KeyError), global_rng(-5):
        raise KeyError
    assert draws[0] == draws[1]
    assert rng_state() == before


# --- settings that cannot work


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"color_jitter": 0.4},
            "data.color_jitter=0.4: only for streamed sets, digits is held in memory; leave it out",
        ),
        ({"shift": 8}, "data.shift=8: must be < 8, the stored size of digits"),
        ({"family": "mnist1d", "hflip": 0.5}, "data.hflip=0.5: only for images, digits holds signals"),
    ],
)
def test_a_setting_that_would_do_nothing_is_an_error(settings, message):
    with pytest.raises(ConfigError) as error:
        load_data(config(**settings), 0)
    assert str(error.value).startswith(message)
