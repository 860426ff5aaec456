"""Measure the time to the first token of a conversation's second turn, with and without prefix caching.

Run the program from the project's root: ``python -m tests.benchmarks.bench_second_turn``. The first turn, prompt and
answer together, has 200 tokens. The second turn adds 20. The weights are random. Both engines answer the same
conversation in each round, and every round has new tokens.
"""

import argparse
import random
import statistics
import time

import torch

from jobs.eval.bench.models import random_model, random_tokenizer
from nanochat_core.config import ModelConfig
from nanochat_core.device import prepare_cpu
from nanochat_core.engine import Engine, EngineConfig, Request, SamplingParams

ANSWER, NEW = 60, 20


def first_token_seconds(engine: Engine, prompt: list[int]) -> float:
    """Return the seconds from the arrival of a request to its first token."""
    started = time.perf_counter()
    engine.add(Request("turn", tuple(prompt), SamplingParams(max_tokens=1)))
    while not engine.step():
        pass
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=200, help="tokens of the first turn, prompt and answer together")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    prepare_cpu(options.threads)
    config = ModelConfig.from_depth(options.depth, vocab_size=options.vocab_size, head_dim=64, context_length=1024)
    model = random_model(config, torch.float32, seed=0)
    tokenizer = random_tokenizer(options.vocab_size)
    engines = {name: Engine(model, tokenizer, EngineConfig(prefix_caching=name == "on")) for name in ("on", "off")}
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    source = random.Random(0)
    for number in range(options.rounds + 1):
        prompt = [source.randrange(options.vocab_size) for _ in range(options.tokens - ANSWER)]
        addition = [source.randrange(options.vocab_size) for _ in range(NEW)]
        for name, engine in engines.items():
            [[answer]] = engine.generate([prompt], SamplingParams(max_tokens=ANSWER))
            taken = first_token_seconds(engine, [*prompt, *answer.token_ids, *addition])
            if number:  # round 0 warms up
                seconds[name].append(taken)
    on, off = (statistics.median(seconds[name]) for name in ("on", "off"))
    print(
        f"second turn after {options.tokens} tokens, {options.rounds} rounds: first token after {1e3 * on:.2f} ms, "
        f"without prefix caching {1e3 * off:.2f} ms, ratio of the medians {off / on:.2f}"
    )


if __name__ == "__main__":
    main()
