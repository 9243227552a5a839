"""The mixture with known truth: its posterior against torch's densities, its Bayes accuracy and calibration."""

import math

import numpy as np
import pytest
import torch
from einops import rearrange
from torch.distributions import MultivariateNormal

from kd.config.schema import DataConfig
from kd.data import load_data
from kd.data.small_sets import mixture_centres, mixture_posterior, mixture_sample

BAYES_ACCURACY = 0.8669


def mixture(seed=0, **settings):
    return load_data(DataConfig(name="mixture", family="mixture", **settings), seed)


def by_bayes_rule(x):
    centres = mixture_centres()
    classes = MultivariateNormal(centres, torch.eye(20, dtype=torch.float64).expand(12, 20, 20))
    density = classes.log_prob(rearrange(x.double(), "n d -> n 1 d")).exp() / 12
    return density / density.sum(1, keepdim=True)


def test_every_split_carries_the_exact_posterior_of_its_stored_points():
    data = mixture(train_size=600)
    for split in (data.train, data.val, data.test):
        assert split.posterior.dtype == torch.float64
        torch.testing.assert_close(split.posterior, by_bayes_rule(split.images), rtol=1e-11, atol=1e-13)


def test_the_posterior_far_from_all_centres_is_finite_and_sums_to_one():
    p = mixture_posterior(1e4 * torch.randn(50, 20, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(p.sum(1), torch.ones(50, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_bayes_rule_scores_what_is_stated_and_is_calibrated():
    """A Monte Carlo check with points of its own: five standard errors for the accuracy, and for every bin."""
    n = 100_000
    x, targets = mixture_sample(n, np.random.RandomState(99))
    p = by_bayes_rule(x)
    right = (p.argmax(1).numpy() == targets).mean()
    assert right == pytest.approx(BAYES_ACCURACY, abs=5 * math.sqrt(BAYES_ACCURACY * (1 - BAYES_ACCURACY) / n) + 2e-4)
    given = mixture_posterior(x).numpy()
    hit = np.eye(12)[targets]
    for low in np.arange(0, 1, 0.1):
        inside = (given >= low) & (given < low + 0.1)
        mean = given[inside].mean()
        error = math.sqrt(mean * (1 - mean) / inside.sum())
        assert hit[inside].mean() == pytest.approx(mean, abs=5 * error), low


def test_sizes_and_what_a_seed_changes():
    small, whole, again = mixture(train_size=600), mixture(), mixture(seed=5, train_size=600)
    assert [len(s) for s in (small.train, small.val, small.test)] == [600, 2000, 20_000]
    assert [len(s) for s in (whole.train, whole.val, whole.test)] == [20_000, 2000, 20_000]
    assert small.train.targets.bincount().tolist() == [50] * 12
    assert small.hash == again.hash != whole.hash
    other = mixture(train_size=600, split_seed=1)
    assert not torch.equal(other.train.images, small.train.images)
    assert torch.equal(other.test.images, small.test.images)
    points = torch.cat([s.images for s in (whole.train, whole.val, whole.test)])
    assert len(points.unique(dim=0)) == 42_000  # no training point is in the test pool
    assert small.input_shape == (20,)
    assert small.class_names[3:5] == ["b1", "b2"]


def test_the_posterior_stays_with_its_points():
    split = mixture(train_size=600).train
    index = torch.tensor([5, 400, 17])
    some = split.subset(index)
    assert torch.equal(some.posterior, split.posterior[index])
    torch.testing.assert_close(some.posterior, mixture_posterior(some.images), rtol=1e-12, atol=0)
    assert torch.equal(some.targets, split.targets[index])
    noisy = mixture(train_size=600, label_noise=0.5).train
    assert torch.equal(noisy.posterior, split.posterior)  # of the true classes
