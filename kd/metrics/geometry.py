"""Geometry of the classes in feature space: variance, separation and Müller's projection.

Features are the inputs of the last layer. At least two classes must be present.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kd.errors import require
from kd.metrics.inputs import Undefined, checked, class_means, present_classes
from kd.metrics.registry import metric

__all__ = ["class_separation", "muller_projection", "within_total_variance"]


@metric("within_total_variance", "within/total variance")
def within_total_variance(features: Tensor, targets: Tensor) -> Tensor:
    """Share of the features' variance that lies within the classes; label smoothing lowers it.

    Σ_i ‖f_i - mean of f over i's class‖² / Σ_i ‖f_i - mean of f‖². From 0 (each class is one point) to 1 (equal class
    means).
    """
    groups = present_classes(targets)
    centred = features - features.mean(dim=0)
    total = centred.square().sum()
    require(total > 0, "features are all equal: there is no variance to share", Undefined)
    return (centred - class_means(centred, groups)[groups]).square().sum() / total


@metric("class_separation", "class separation R²")
def class_separation(features: Tensor, targets: Tensor) -> Tensor:
    """Class separation R² in cosine distance. Label smoothing raises it, and features transfer worse where it is high.

    1 - d_within / d_total. d_within is the mean of 1 - cos over the pairs of a class (a sample with itself too),
    averaged over the classes; d_total is the mean over the pairs of all classes, each class of equal weight; Kornblith
    et al. 2021, "Why Do Better Loss Functions Lead to Less Transferable Features?", section 4. From 0 (equal mean
    directions) to 1 (each class has one direction). Rows of zeros, where every ReLU is off, have no direction and are
    left out.
    """
    alive = (features != 0).any(dim=1)
    require(alive.any(), "features are all 0: they have no direction", Undefined)
    features, groups = features[alive], present_classes(targets[alive])
    # The mean cosine over all pairs of two classes is the product of their mean unit vectors.
    means = class_means(features / features.norm(dim=1, keepdim=True), groups)
    within = 1 - means.square().sum(dim=1).mean()
    total = 1 - means.mean(dim=0).square().sum()
    require(total > 1e-15, "features have all the same direction: there is no distance to share", Undefined)
    return 1 - within / total


@checked
def muller_projection(features: Tensor, weight: Tensor, bias: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Projection of features onto the plane through the templates of three classes.

    A class's template is its row of the last layer with the bias appended, (w_c, b_c); a feature is (f, 1). The plane
    goes through templates i, j, k; its origin is template i, its basis the orthonormal one of (w_j - w_i, w_k - w_i) by
    QR, with j on the first axis and k above it. Müller et al. 2019, "When Does Label Smoothing Help?", section 2, 100
    examples of each class. Returns the positions of the features (N, 2) and of the templates (3, 2), in float64.

    Parameters
    ----------
    features : (N, D)
    weight : (K, D) of the last layer
    bias : (K,) of the last layer; zeros for a layer without one
    classes : three different classes
    """
    chosen = torch.cat([weight, bias.detach().double()[:, None]], dim=1)[list(classes)]
    edges = (chosen[1:] - chosen[0]).T  # (D + 1, 2)
    basis, upper = torch.linalg.qr(edges)
    size = upper.diagonal()
    spans = len(chosen) == 3 and size.abs().min() > 1e-12 * upper.abs().max()
    require(spans, f"classes={list(classes)}: must be three whose templates span a plane", Undefined)
    basis = basis * size.sign()
    points = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    return (points - chosen[0]) @ basis, (chosen - chosen[0]) @ basis
