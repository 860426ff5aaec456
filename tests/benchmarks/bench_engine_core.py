"""Decode throughput of the inference core on random weights: ``python tests/benchmarks/bench_engine_core.py``.

Each row serves a batch of different prompts of 32 tokens to 128 greedy or 128 sampled tokens and reports the best of
several runs in tokens per second, prefill included. "model" is the share of the time that the network and its attention
took; the rest is scheduling, sampling and bookkeeping.
"""

from __future__ import annotations

import argparse
import time

import torch

from nanochat_core.config import ModelConfig
from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from nanochat_core.model import GPT
from nanochat_core.tokenizer import SPECIAL_TOKENS, Tokenizer

PROMPT_TOKENS, NEW_TOKENS = 32, 128


def build_engine(depth: int, head_dim: int, vocab_size: int, context_length: int) -> Engine:
    """An engine around a model with random weights, output projections included."""
    torch.manual_seed(0)
    config = ModelConfig.from_depth(depth, vocab_size=vocab_size, head_dim=head_dim, context_length=context_length)
    model = GPT(config)
    model.init_weights()
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.05)
    ordinary = vocab_size - len(SPECIAL_TOKENS)
    tokenizer = Tokenizer([bytes([i % 256]) * (i // 256 + 1) for i in range(ordinary)])
    # Without prefix caching, so that repeating a run repeats its work.
    engine = Engine(model, tokenizer, EngineConfig(prefix_caching=False))
    engine.warm_up()
    return engine


def measure(engine: Engine, batch: int, sampling: SamplingParams) -> tuple[float, float]:
    """Tokens per second of one run, and the share of its time spent in the model."""
    prompts = torch.randint(engine.model_config.vocab_size, (batch, PROMPT_TOKENS)).tolist()
    in_model, run = 0.0, engine.runner.run

    def timed(*args):  # type: ignore[no-untyped-def]
        nonlocal in_model
        started = time.perf_counter()
        result = run(*args)
        in_model += time.perf_counter() - started
        return result

    engine.runner.run = timed  # type: ignore[method-assign]
    started = time.perf_counter()
    engine.generate(prompts, sampling)
    seconds = time.perf_counter() - started
    engine.runner.run = run  # type: ignore[method-assign]
    return batch * NEW_TOKENS / seconds, in_model / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    engine = build_engine(args.depth, args.head_dim, args.vocab_size, args.context_length)
    modes = {
        "greedy": SamplingParams(max_tokens=NEW_TOKENS),
        "sampled": SamplingParams(max_tokens=NEW_TOKENS, temperature=0.8, top_k=50, seed=1),
    }
    print(f"{'batch':>5} {'mode':>8} {'tokens/s':>9} {'model':>6}")
    for batch in (1, 8, 32):
        for mode, sampling in modes.items():
            speed, share = max(measure(engine, batch, sampling) for _ in range(args.repeat))
            print(f"{batch:>5} {mode:>8} {speed:>9.0f} {share:>6.0%}")


if __name__ == "__main__":
    main()
