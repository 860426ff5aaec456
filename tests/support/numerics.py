"""Runs the tests with the rounding of other processors: ``python -m tests.support.numerics [PYTEST_ARGUMENT ...]``.

No test may depend on rounding. Each variant fixes the seed of training, the library for fp32 matrix products, the dtype
of Muon's products, the instruction set and the number of threads. Users' machines have these combinations. Without
arguments, this program runs all tests that train a model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).parent
TRAINING_TESTS = [
    "tests/e2e",
    *(f"tests/integration/test_{name}.py" for name in ("pipeline", "pretrain", "ranks", "rl", "scaling", "sft")),
    *(f"tests/unit/test_{name}.py" for name in ("model", "optim", "optim_ranks", "policy_gradient", "trainer")),
]
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def variant(seed: int, products: str, *, bf16: bool, threads: int, **variables: str) -> dict[str, str]:
    """The environment of one variant.

    Args:
        seed: seed of pretraining, fine-tuning and reinforcement learning.
        products: library for fp32 products, ``onednn`` or ``torch`` (MKL).
        bf16: whether the CPU, and therefore Muon, multiplies in bf16.
        threads: threads of each process.
        variables: further environment variables.
    """
    capabilities = {"avx512_bf16": bf16, "amx_bf16": False}
    seeds = {f"NANOCHAT_{stage}_SEED": str(seed) for stage in ("PRETRAIN", "SFT", "RL")}
    return {
        "PYTHONPATH": str(SUPPORT / "other_cpu"),
        "NANOCHAT_CPU_PRODUCTS": products,
        "NANOCHAT_TEST_CPU": json.dumps(capabilities),
        "NANOCHAT_TEST_THREADS": str(threads),
        **seeds,
        **variables,
    }


VARIANTS = {
    "oneDNN, Muon in fp32": variant(1, "onednn", bf16=False, threads=1),
    "MKL, Muon in bf16": variant(2, "torch", bf16=True, threads=1),
    "MKL, Muon in fp32, two threads": variant(3, "torch", bf16=False, threads=2),
    "oneDNN, Muon in bf16, two threads": variant(4, "onednn", bf16=True, threads=2),
    "MKL, Muon in fp32, AVX2": variant(5, "torch", bf16=False, threads=1, **AVX2),
}


def main(arguments: list[str]) -> int:
    failed = []
    for name, environment in VARIANTS.items():
        print(f"=== {name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-m", "not cluster", *(arguments or TRAINING_TESTS)]
        if subprocess.run(command, env=os.environ | environment, check=False).returncode:
            failed.append(name)
    print("failed: " + "; ".join(failed) if failed else f"all {len(VARIANTS)} variants passed")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
