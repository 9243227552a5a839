"""Networks made of networks: a student with a method's classifier, and several teachers as one.

Both take what their parts take and give logits (n, k), so that a Teacher or Student holds them like any network.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd.losses.methods.base import Method
from kd.losses.methods.temperature import arithmetic_mean
from kd.models.layers import Taps
from kd.models.outputs import logits_of
from kd.models.wrappers import Student


class Reclassified(nn.Module):
    """A network whose logits a method makes from its features: what is evaluated and shipped where one `classifies`."""

    def __init__(self, network: nn.Module, taps: Taps, method: Method):
        super().__init__()
        self.student = Student(network, features=taps.names)
        self.method = method
        self._taps = taps

    def forward(self, *inputs: Any) -> Tensor:
        """The method's logits (n, k)."""
        return self.method.classify(self._taps.view(self.student.model, self.student(*inputs)))


class Ensemble(nn.Module):
    """Several networks as one, whose softmax at `temperature` is the mean of theirs.

    Hinton et al. 2015, §1 (the arithmetic mean); You et al. 2017, "Learning from Multiple Teacher Networks", at the
    temperature of the loss.
    """

    def __init__(self, members: Sequence[nn.Module], temperature: float = 1.0):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperature = temperature

    def forward(self, *inputs: Any) -> Tensor:
        """Logits (n, k)."""
        logits = torch.stack([logits_of(member(*inputs)) for member in self.members])
        return arithmetic_mean(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.temperature)
