"""What computes a step: PyTorch's operators, or the engine's own kernels for CPUs or for GPUs."""
