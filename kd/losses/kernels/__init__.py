"""The fused loss: numba on a CPU, Triton on a GPU."""
