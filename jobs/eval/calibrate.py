"""Show the CPU library chosen for each matrix product of a model: ``python -m jobs.eval.calibrate --depth 4``."""

import dataclasses
import itertools

from jobs.markdown import table
from jobs.measures.machine import describe_machine
from jobs.program import JobSettings, run_program
from nanochat_core.config import ModelConfig
from nanochat_core.cpu_calibration import answers, answers_path, forget
from nanochat_core.cpu_matmul import library_for
from nanochat_core.device import prepare_cpu
from nanochat_core.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateSettings(JobSettings):
    """Show which CPU library or dtype was chosen for each computation on this processor, and the measured times.

    Training makes the same measurements when it needs them.
    """

    depth: int = setting(
        0, "also measure the matrix products of a model of this depth; 0 shows only earlier times", minimum=0
    )
    head_dim: int = setting(64, "head dimension of the model of --depth", minimum=2)
    vocab_size: int = setting(4096, "vocabulary size of the model of --depth", minimum=1)
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0, maximum=4096)
    again: bool = setting(False, "forget all earlier measurements of this processor first")


def shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """The shapes (out_features, in_features) of the weights in all large matrix products of a training step."""
    dim, hidden, rows = config.dim, 4 * config.dim, config.padded_vocab_size
    weights = [(dim, dim), (config.kv_dim, dim), (hidden, dim), (dim, hidden), (rows, dim)]
    # The transposed shapes are included, because the gradient of a layer's input is a product with the transposed
    # weight.
    return list(dict.fromkeys(itertools.chain.from_iterable([(out, into), (into, out)] for out, into in weights)))


def run(settings: CalibrateSettings) -> None:
    prepare_cpu(settings.threads)
    if settings.again:
        forget()
    if settings.depth:
        config = ModelConfig.from_depth(settings.depth, vocab_size=settings.vocab_size, head_dim=settings.head_dim)
        for shape in shapes(config):
            library_for(*shape)
    machine, kept = describe_machine(), answers()
    print(f"{machine['processor']}, torch {machine['torch']}: {answers_path()}\n")
    names = list(dict.fromkeys(name for answer in kept.values() for name in answer.seconds))
    rows = [
        (question, answer.choice, *(_milliseconds(answer.seconds.get(name)) for name in names))
        for question, answer in sorted(kept.items())
    ]
    print("\n".join(table(("Computation", "chosen", *(f"{name}, ms" for name in names)), rows)))


def _milliseconds(seconds: float | None) -> str:
    return "—" if seconds is None else f"{1000 * seconds:.3f}"


if __name__ == "__main__":
    run_program("jobs.eval.calibrate", "calibrate", CalibrateSettings, run)
