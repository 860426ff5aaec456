"""Measure how exactly one engine continues what another engine of the same kind has begun.

The first engine decodes token by token. The second engine computes the first engine's tokens as a prompt. If the two
round differently, the log probabilities of later tokens differ, and two candidates that almost tie may change places.
The program continues greedy and seeded completions from many positions, all at once and with other completions in the
batch, and compares them with completions that one engine wrote alone.

Run the program from the project's root: ``python -m tests.benchmarks.continue_numerics``, or with ``--home .nanochat
--model demo`` for a trained model.
"""

import argparse
import dataclasses
import random
from typing import Any

import torch

from jobs.eval.bench.models import random_model, random_tokenizer
from nanochat_core.checkpoint import newest_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.device import prepare_cpu
from nanochat_core.engine import Completion, Continuation, Engine, EngineConfig, Request, SamplingParams
from nanochat_core.errors import UserError
from nanochat_core.store import open_store

# Each entry has the name, the compute dtype and the engine's settings.
KINDS: tuple[tuple[str, torch.dtype, dict[str, Any]], ...] = (
    ("fp32", torch.float32, {}),
    ("bf16", torch.bfloat16, {}),
    ("int8", torch.float32, {"quantization": "int8"}),
    ("int8, bf16", torch.bfloat16, {"quantization": "int8"}),
    ("fp32, PyTorch's operators", torch.float32, {"kernels": False}),
    ("bf16, PyTorch's operators", torch.bfloat16, {"kernels": False}),
)


def make_engine(options: argparse.Namespace, dtype: torch.dtype, settings: dict[str, object]) -> Engine:
    config = EngineConfig(prefix_caching=False, max_waiting=100_000, **settings)  # type: ignore[arg-type]
    device = torch.device(options.device)
    if options.model is None:
        shape = ModelConfig.from_depth(options.depth, vocab_size=options.vocab_size, head_dim=64, context_length=1024)
        return Engine(random_model(shape, dtype, seed=0).to(device), random_tokenizer(options.vocab_size), config)
    checkpoint = newest_checkpoint(open_store(options.home), options.model, options.stage)
    if checkpoint is None:
        raise UserError(f"{options.model} has no {options.stage} checkpoint in {options.home}")
    return Engine(checkpoint.build_model(device, dtype), checkpoint.tokenizer, config)


def compare(whole: Completion, rest: Completion, cut: int) -> tuple[float, bool]:
    """Compare the log probabilities and the texts of two completions.

    Returns the greatest difference of two log probabilities before the texts differ, and whether the texts differ.
    """
    difference = 0.0
    for expected, token in zip(whole.tokens[cut:], rest.tokens, strict=True):
        if token.id != expected.id:
            return difference, True
        before, after = (dict([(t.id, t.logprob), *t.top_logprobs]) for t in (expected, token))
        difference = max([difference, *(abs(before[id] - after[id]) for id in before.keys() & after.keys())])
    return difference, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", default=".nanochat")
    parser.add_argument("--model", help="name of a model in the store; without it the weights are random")
    parser.add_argument("--stage", default="base")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96, help="tokens of each completion")
    parser.add_argument("--every", type=int, default=8, help="tokens between two positions to continue from")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="measure only the kinds whose name contains this")
    options = parser.parse_args()
    prepare_cpu(options.threads)
    print(f"{'kind':>26} {'continued':>10} {'other bits':>10} {'greatest difference':>20} {'other text':>10}")
    for name, dtype, settings in (kind for kind in KINDS if options.only in kind[0]):
        first, second = (make_engine(options, dtype, settings) for _ in range(2))
        source = random.Random(0)
        requests = [
            Request(
                f"{number} {temperature}",
                tuple(source.randrange(256) for _ in range(source.randint(1, 200))),
                SamplingParams(temperature, seed=number, max_tokens=options.tokens, logprobs=20),
            )
            for number in range(options.prompts)
            for temperature in (0.0, 1.0)
        ]
        whole = {request.id: completion for request in requests for _, [completion] in first.complete([request])}
        later = [
            dataclasses.replace(
                request,
                id=f"{request.id} {cut}",
                continued=(Continuation(0, tuple(whole[request.id].tokens[:cut])),),
            )
            for request in requests
            for cut in range(1, options.tokens, options.every)
        ]
        results = []
        for request_id, [rest] in second.complete(later):
            origin, _, cut = request_id.rpartition(" ")
            results.append(compare(whole[origin], rest, int(cut)))
        other_bits = sum(difference > 0 for difference, _ in results)
        greatest, other_text = max(difference for difference, _ in results), sum(changed for _, changed in results)
        print(f"{name:>26} {len(results):10} {other_bits:10} {greatest:20.2e} {other_text:10}")


if __name__ == "__main__":
    main()
