"""``prepare_cpu`` changes the settings of a process."""

import subprocess
import sys


def test_a_prepared_process_has_its_threads_and_flushes_denormals() -> None:
    code = """
import torch
from nanochat_core.device import prepare_cpu
default = torch.get_num_threads()
prepare_cpu(0)
assert torch.get_num_threads() == default
prepare_cpu(3)
assert torch.get_num_threads() == 3
tiny = torch.full((100_000,), 1e-38)
assert not (tiny * 1e-3).any()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
