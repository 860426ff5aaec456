"""Compare the speed of reinforcement learning rollouts in this project and in karpathy/nanochat (the peer).

Run the program from the project's root: ``python -m tests.benchmarks.bench_rollouts_peer --peer PATH``. Both sides use
the same random weights and alternate. Each run is a new process that loads the weights, answers one prompt as a
warm-up, and then samples the rollouts of one training step: 16 examples with 16 samples each, temperature 1, top-k 50
and at most 256 tokens. These values are the defaults of both sides.

The peer runs as in its ``chat_rl.py``: its own engine answers one prompt after another, ``--device-batch`` samples at a
time. A batch lasts until its longest sample ends. On both sides some ordinary tokens end an answer, so answers differ
in length like real ones. The two sides sample different tokens, so the rate of a side counts the tokens of that side.
The weights are random, so no answer calls a tool.

``--one-at-a-time`` adds a run of our engine with the peer's batches. The ratio of this run to the peer shows the speed
of the engine alone. The further gain of the normal run comes from larger batches.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError, run_main
from tests.benchmarks.peer import PEER_DTYPES, peer_config, run_ours, run_peer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of karpathy/nanochat")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--device-batch", type=int, default=8, help="samples of one prompt per batch of the peer")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--mean-length", type=int, default=100, help="approximate mean length of an answer in tokens")
    parser.add_argument("--one-at-a-time", action="store_true", help="also measure our engine with the peer's batches")
    parser.add_argument("--dtype", choices=PEER_DTYPES, default="fp32")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    if options.samples % options.device_batch:
        raise UserError("--samples must be a multiple of --device-batch")
    config = ModelConfig.from_depth(
        options.depth, vocab_size=options.vocab_size, head_dim=64, context_length=options.context_length
    )
    draw = np.random.default_rng(options.seed)
    prompts = [
        draw.integers(options.vocab_size, size=int(n)).tolist() for n in draw.integers(40, 121, options.examples)
    ]
    sides = ["peer", "ours", *(["ours, one prompt at a time"] if options.one_at_a_time else [])]
    rates: dict[str, list[float]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        task: dict[str, Any] = {
            "config": peer_config(config),
            "folder": str(folder / "weights"),
            "prompts": prompts,
            "warm_up": draw.integers(options.vocab_size, size=64).tolist(),
            "samples": options.samples,
            "device_batch": options.device_batch,
            "max_new_tokens": options.max_new_tokens,
            "temperature": 1.0,
            "top_k": 50,
            "stop": draw.permutation(options.vocab_size)[: options.vocab_size // options.mean_length].tolist(),
            "threads": options.threads,
            "dtype": options.dtype,
            "seed": options.seed,
            "result": str(folder / "result.json"),
        }
        run_peer(options.peer, "weights", task, folder, options.dtype)
        for number in range(1, options.rounds + 1):
            # The order of the sides alternates between rounds.
            for side in sides if number % 2 else sides[::-1]:
                if side == "peer":
                    run_peer(options.peer, "rollouts", task, folder, options.dtype)
                else:
                    run_ours("our_rollouts_process", task | {"one_at_a_time": side != "ours"}, folder)
                result = json.loads((folder / "result.json").read_bytes())
                lengths = [length for choices in result["lengths"] for length in choices]
                if len(lengths) != options.examples * options.samples:
                    raise UserError(f"{side} gave {len(lengths)} rollouts")
                rates[side].append(sum(lengths) / result["seconds"])
                print(
                    f"round {number}: {side:<26} {len(lengths)} rollouts of {statistics.mean(lengths):.0f} tokens "
                    f"({min(lengths)} to {max(lengths)}), {rates[side][-1]:.0f} tokens/s",
                    flush=True,
                )
    peer = statistics.median(rates["peer"])
    print(f"\n{options.dtype}, depth {options.depth}, {options.threads} threads, medians of {options.rounds} rounds\n")
    print("| rollouts | tokens/s | ratio |")
    print("| --- | ---: | ---: |")
    for side in sides:
        ours = statistics.median(rates[side])
        print(f"| {side} | {ours:,.0f} | {ours / peer:.2f} |")
    return 0


if __name__ == "__main__":
    run_main(main, "bench_rollouts_peer.py")
