"""Compare int8 weights with fp32 and bf16 weights: generation speed and loss of quality.

Run the program from the project's root. ``python -m tests.benchmarks.bench_int8`` measures the speed of a model with
random weights. With ``--home .nanochat --model demo`` it measures a trained model and also compares the model's
predictions on the validation text. The kinds of weights alternate in each round.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import pyarrow.parquet as pq
import torch
from torch import Tensor

from jobs.eval.bench.models import random_model, random_tokenizer
from nanochat_core.checkpoint import Checkpoint, newest_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.device import prepare_cpu
from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from nanochat_core.engine.request import Request
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.sequence import Sequence
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.store import open_store
from nanochat_core.tokenizer import Tokenizer

# Each entry has the name, the compute dtype and the quantization of one kind of weights.
KINDS = (
    ("fp32", torch.float32, "none"),
    ("bf16", torch.bfloat16, "none"),
    ("int8", torch.float32, "int8"),
    ("int8, bf16", torch.bfloat16, "int8"),
)
CASES = {"one stream": 1, "4 streams": 4, "16 streams": 16, "64 streams": 64}


def decode_speed(engine: Engine, streams: int, prompt: list[int], tokens: int) -> float:
    """Return the generated tokens per second. The duration includes the prefill of the prompt."""
    started = time.perf_counter()
    engine.generate([prompt], SamplingParams(temperature=1.0, seed=0, max_tokens=tokens), n=streams)
    return streams * tokens / (time.perf_counter() - started)


def compare_speed(engines: dict[str, Engine], options: argparse.Namespace) -> None:
    print(f"{'tokens/s':>12} " + " ".join(f"{name:>12}" for name in engines))
    source = random.Random(0)
    for case, streams in CASES.items():
        speeds: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(options.rounds + 1):
            prompt = [source.randrange(256) for _ in range(32)]
            for name, engine in engines.items():
                speed = decode_speed(engine, streams, prompt, options.tokens)
                if number:  # round 0 warms up
                    speeds[name].append(speed)
        print(f"{case:>12} " + " ".join(f"{statistics.median(values):12.0f}" for values in speeds.values()))


def logits_of(engine: Engine, row: list[int]) -> Tensor:
    """Return the logits after each token of a row, computed as in serving. Their shape is (len(row), vocab_size)."""
    seq = Sequence(Request("row", tuple(row[:1]), SamplingParams(max_tokens=1)), 0, 0, 0, len(row) + 1)
    blocks = range(engine.blocks.blocks_for(len(row)))
    seq.block_tables = [list(blocks) for _ in engine.blocks.groups]
    _, logits = engine.runner.run([Chunk(seq, 0, 1, row[1:])])
    return logits


def compare_quality(engines: dict[str, Engine], rows: list[list[int]]) -> None:
    """Print each engine's loss on the rows, and how much its predictions differ from the first engine's predictions.

    Two numbers show the difference: the Kullback-Leibler divergence in nats, and the share of positions at which both
    engines find the same token most likely.
    """
    losses: dict[str, list[float]] = {name: [] for name in engines}
    divergence: dict[str, list[float]] = {name: [] for name in engines}
    same: dict[str, list[float]] = {name: [] for name in engines}
    for row in rows:
        expected = None
        for name, engine in engines.items():
            logs = logits_of(engine, row).double().log_softmax(-1)
            expected = logs if expected is None else expected
            losses[name].append(float(-logs[:-1].gather(1, torch.tensor(row[1:]).unsqueeze(1)).mean()))
            divergence[name].append(float((expected.exp() * (expected - logs)).sum(-1).mean()))
            same[name].append(float((logs.argmax(-1) == expected.argmax(-1)).double().mean()))
    tokens = sum(len(row) - 1 for row in rows)
    print(
        f"\n{tokens} tokens of validation text: loss in nats, divergence from {next(iter(engines))}, equal best tokens"
    )
    for name in engines:
        loss, kl, equal = (statistics.fmean(values[name]) for values in (losses, divergence, same))
        print(f"{name:>12} {loss:9.5f} {kl:10.2e} {equal:8.2%}")


def validation_rows(options: argparse.Namespace, checkpoint: Checkpoint) -> list[list[int]]:
    """Concatenate the documents of the last shard and cut them into rows of the context length."""
    shards = sorted(Path(options.home, "data", options.dataset or options.model).glob("shard_*.parquet"))
    if not shards:
        raise UserError(f"{options.home}/data/{options.dataset or options.model} contains no shards; give --dataset")
    tokens: list[int] = []
    length = checkpoint.config.context_length
    for text in pq.read_table(shards[-1], columns=["text"]).column("text").to_pylist():
        tokens += [checkpoint.tokenizer.bos_id, *checkpoint.tokenizer.encode(text)]
        if len(tokens) >= options.rows * length:
            break
    return [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)][: options.rows]


def build(options: argparse.Namespace, dtype: torch.dtype, checkpoint: Checkpoint | None) -> tuple[GPT, Tokenizer]:
    if checkpoint is not None:
        return checkpoint.build_model(torch.device("cpu"), dtype), checkpoint.tokenizer
    config = ModelConfig.from_depth(options.depth, vocab_size=options.vocab_size, head_dim=64, context_length=1024)
    return random_model(config, dtype, seed=0), random_tokenizer(options.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", default=".nanochat")
    parser.add_argument("--model", help="name of a model in the store; without it the weights are random")
    parser.add_argument("--stage", default="base")
    parser.add_argument("--dataset", help="dataset with the validation text; the default is the model's name")
    parser.add_argument("--rows", type=int, default=60, help="number of validation rows")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=64, help="generated tokens per stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    prepare_cpu(options.threads)
    checkpoint = newest_checkpoint(open_store(options.home), options.model, options.stage) if options.model else None
    if options.model and checkpoint is None:
        raise UserError(f"{options.model} has no {options.stage} checkpoint in {options.home}")
    engines = {}
    for name, dtype, quantization in KINDS:
        model, tokenizer = build(options, dtype, checkpoint)
        config = EngineConfig(quantization=quantization, speculative_tokens=0, prefix_caching=False)
        engines[name] = Engine(model, tokenizer, config)
    compare_speed(engines, options)
    if checkpoint is not None:
        compare_quality(engines, validation_rows(options, checkpoint))


if __name__ == "__main__":
    main()
