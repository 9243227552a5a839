"""Logits of a whole split."""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from kd.data import Split
from kd.models.wrappers import Student, Teacher
from kd.runtime.signals import check


@torch.no_grad()
def predict(model: Student | Teacher, split: Split, batch_size: int, accelerator: Accelerator) -> Tensor:
    """Logits (N, K), float32 on the CPU, of a split in its own order and without augmentation; equal on all processes.

    Raises Interrupted on every process where one was asked to stop.
    """
    model.eval()  # the loop sets train mode again before each update
    size, world = len(split), accelerator.num_processes
    # `gather` needs the same number of rows from every process: the first rows are repeated, and cut off again below.
    padded = torch.arange(math.ceil(size / world) * world) % size
    plan = list(padded[accelerator.process_index :: world].split(max(1, batch_size // world)))
    rows = []
    for batch in split.batches(plan, epoch=None):
        check(accelerator)
        with accelerator.autocast():
            rows.append(model(batch.images).logits.float())
    logits = torch.cat(rows)
    gathered = accelerator.gather(logits).view(world, len(logits), -1)
    return gathered.transpose(0, 1).reshape(world * len(logits), -1)[:size].cpu()


def not_finite(logits: Tensor) -> str:
    """How many of the validation images have logits (N, K) that are not finite, as a clause; '' where none has."""
    bad = int((~logits.isfinite().all(dim=1)).sum())
    return f"logits of {bad} of {len(logits)} validation images are not finite" if bad else ""
