"""Parts that run other programs: the tests that use a GPU, and the comparisons with other projects."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.eval.gpu_parts.context import FULL, Context, Result, Unavailable

ROOT = Path(__file__).parents[3]
# Files whose tests run on a GPU if there is one. Besides pytest, they need only the packages of ``nanochat_core``.
TEST_FILES = ("test_engine_gpu.py", "test_attention.py", "test_fp8.py", "test_loss.py")


class ProgramFailed(Exception):
    """A program ended with an error; the message has the end of its output."""


def run_tests(context: Context) -> Result:
    """Run the tests that use a GPU. Raises ProgramFailed if one fails, and Unavailable without pytest."""
    if importlib.util.find_spec("pytest") is None:
        raise Unavailable("pytest is not installed; install it, or put a folder with it on PYTHONPATH")
    files = [f"tests/unit/{name}" for name in TEST_FILES]
    # conftest.py is left out, because it imports packages that a machine for the check need not have.
    command = ["-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-r", "fE", "-k", context.scale.tests, *files]
    # Without a GPU, TRITON_INTERPRET is set, because Triton can then only interpret its kernels.
    output = run_python(command, {} if context.device.type == "cuda" else {"TRITON_INTERPRET": "1"})
    counts = dict(re.findall(r"(\d+) (passed|skipped|deselected)", output.splitlines()[-1]))
    return {kind: int(number) for number, kind in counts.items()}


def compare_engine(context: Context) -> Result:
    """Measure this project's engine and karpathy/nanochat's engine in the same way."""
    if context.peer is None:
        raise Unavailable("give a checkout of karpathy/nanochat by --peer")
    cases = "single,samples-8,samples-64,samples-256" if context.scale is FULL else "single"
    return _comparison(context, "bench_engine_peer", ["--peer", str(context.peer), "--cases", cases])


def compare_transformers(context: Context) -> Result:
    """Measure this project's engine and the continuous batching of the package transformers in the same way."""
    if context.transformers is None:
        raise Unavailable("transformers is not installed; install it, or name a folder with it by --transformers")
    sizes = ",".join(map(str, context.scale.batch_sizes))
    return _comparison(
        context, "bench_engine_transformers", ["--transformers", str(context.transformers), "--batches", sizes]
    )


def compare_training(context: Context) -> Result:
    """Measure the training of this project and of karpathy/nanochat in the same way."""
    if context.peer is None:
        raise Unavailable("give a checkout of karpathy/nanochat by --peer")
    flags = ["--peer", str(context.peer), "--seconds", "10" if context.scale is FULL else "1"]
    return _comparison(context, "bench_train_peer", flags)


def _comparison(context: Context, program: str, flags: Sequence[str]) -> Result:
    """Run one round of the comparison ``program``.

    Returns the lines of the Markdown table that the program prints; without a table, the last four lines of its output.
    """
    scale = context.scale
    shape = {
        "device": context.device.type,
        "dtype": "bf16" if context.device.type == "cuda" else "fp32",
        "depth": scale.depths[0],
        "head-dim": scale.head_dim,
        "vocab-size": scale.vocab_size,
        "context-length": scale.context_length,
        "rounds": 1,
    }
    given = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    lines = run_python(["-m", f"tests.benchmarks.{program}", *given, *flags], {}).strip().splitlines()
    return {"lines": [line for line in lines if line.startswith("|")] or lines[-4:]}


def run_python(arguments: Sequence[str], environment: dict[str, str]) -> str:
    """Run Python in the project's root and return its output. Raises ProgramFailed if it ends with an error."""
    done = subprocess.run(  # noqa: S603 - the callers build the command
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ProgramFailed(f"{' '.join(arguments[:4])} exits with {done.returncode}:\n{done.stdout[-4000:]}")
    return done.stdout
