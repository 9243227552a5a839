"""Losses between a student's logits, a teacher's logits and labels.

- ``distill.DistillLoss``: label-smoothed cross entropy plus distillation (Hinton et al. 2015)
- ``linear.LinearDistillLoss``: the same on the logits of a linear head, without holding them
- ``methods``: the published methods, by name

``reference`` defines the loss in plain PyTorch; ``kernels`` has the same loss fused, for CPUs and GPUs. ``settings``,
``ranges`` and ``inputs`` check settings and tensors. The public names are in ``kd`` itself, which loads them on first
use: ``ranges`` and the names of the methods are read without torch.
"""
