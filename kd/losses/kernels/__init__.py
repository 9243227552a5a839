"""The distillation loss fused, one backend for each kind of device.

``autograd`` runs them under autograd, torch.compile and torch.func. ``cpu`` and ``cpu_kernel`` are the backend of a CPU
(numba), ``triton`` and ``triton_kernels`` that of a GPU. ``chunked`` runs any of them behind a linear head.
"""
