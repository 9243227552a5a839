"""Mixup and CutMix: images and targets are mixed by the same share."""

import pytest
import torch

from kd.config.schema import DataConfig
from kd.data import mixer

TARGETS = torch.tensor([0, 1, 2, 3, 4, 5])


def batch():
    images = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return images, TARGETS


def share(soft):
    """The coefficient, the same for the whole batch, that the targets say: of the own class, rest to the one before."""
    own, other = soft[range(6), TARGETS], soft[range(6), TARGETS.roll(1)]
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    torch.testing.assert_close(own + other, torch.ones(6))
    assert own.unique().numel() == 1
    return own[0]


def test_mixup_mixes_images_by_the_share_of_the_targets():
    images, targets = batch()
    shares = set()
    for seed in range(20):
        mixed, soft = mixer(DataConfig(mixup=1.0), 8)(images, targets, seed)
        assert soft.shape == (6, 8)
        lam = share(soft)
        torch.testing.assert_close(mixed, lam * images + (1 - lam) * images.roll(1, 0))
        shares.add(round(lam.item(), 4))
    assert len(shares) > 15
    assert min(shares) < 0.3 < 0.7 < max(shares)


def test_cutmix_pastes_a_box_whose_area_is_the_share_of_the_targets():
    images, targets = batch()
    for seed in range(20):
        mixed, soft = mixer(DataConfig(cutmix=1.0), 8)(images, targets, seed)
        own = (mixed == images).all(1)
        pasted = (mixed == images.roll(1, 0)).all(1)
        assert (own ^ pasted).all()
        assert own.double().mean(dim=(1, 2)).tolist() == pytest.approx([share(soft).item()] * 6)
        rows, columns = pasted[0].any(1).sum(), pasted[0].any(0).sum()
        assert pasted[0].sum() == rows * columns  # a box


def test_both_take_turns():
    images, targets = batch()
    mix = mixer(DataConfig(mixup=0.5, cutmix=0.5), 8)
    pasted = [
        bool(((m := mix(images, targets, s)[0]) == images).logical_or(m == images.roll(1, 0)).all()) for s in range(40)
    ]
    assert 10 < sum(pasted) < 30


def test_the_seed_decides_and_the_global_generator_is_not_used():
    images, targets = batch()
    mix = mixer(DataConfig(mixup=0.3, cutmix=1.0), 8)
    before = torch.get_rng_state()
    first = mix(images, targets, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = mix(images, targets, 5), mix(images, targets, 6)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(images, batch()[0])  # not changed in place
