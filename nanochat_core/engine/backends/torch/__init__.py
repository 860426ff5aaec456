"""The backend that uses PyTorch's operators. It runs on every device that PyTorch supports."""
