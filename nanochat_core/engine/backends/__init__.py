"""Backends that compute a step: PyTorch's operators, or the engine's own kernels for CPUs and for GPUs."""
