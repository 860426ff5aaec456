"""The engine on PyTorch's operators; it runs on every device that PyTorch supports."""
