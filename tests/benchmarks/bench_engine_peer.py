"""The inference core against karpathy/nanochat's engine, same random weights, in alternating runs.

``python -m tests.benchmarks.bench_engine_peer --peer PATH --dtype fp32 --rounds 5``, from the project's root. Every run
is a process of its own that loads the weights, answers a few other requests of the case untimed, and then the case's.

Both sides get the same prompts and give exactly the same number of tokens; greedy ones must be the same in fp32. The
peer runs as its ``chat_cli.py`` does: ``Engine.generate``, without torch.compile, read to its end; on a CPU its weights
are fp32, and cast in every pass where it computes in bf16. It prefills one prompt and decodes samples of that alone, so
it serves 64 different requests best one after another. To group those whose prompts have the same length would mean to
write another engine around its network, and would gain little: 64 prompts of 10 to 200 tokens have some 54 lengths.
"""

from __future__ import annotations

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

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 128
WARM_UP_TOKENS = 16


def request(prompt: np.ndarray, output: int, n: int = 1, *, sampled: bool = False) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "top_k": 50} if sampled else {"temperature": 0.0, "top_k": None}
    return {"prompt": prompt.tolist(), "output": output, "n": n, **sampling}


def cases(vocab_size: int, seed: int) -> dict[str, dict[str, Any]]:
    """Requests of each case in batches that come one after another, and those to warm up with.

    A side may answer the requests of a batch in any order or at once. No prompt comes twice, so that nothing is in our
    prefix cache.
    """
    draw = np.random.default_rng(seed)

    def samples(n: int, times: int, *, sampled: bool = True) -> dict[str, Any]:
        def one(output: int) -> dict[str, Any]:
            return request(draw.integers(vocab_size, size=PROMPT_TOKENS), output, n, sampled=sampled)

        return {"warm_up": [one(WARM_UP_TOKENS)], "batches": [[one(OUTPUT_TOKENS)] for _ in range(times)]}

    def different(count: int, most_output: int) -> list[dict[str, Any]]:
        lengths = zip(draw.integers(10, 201, count), draw.integers(10, 121, count), strict=True)
        return [request(draw.integers(vocab_size, size=p), min(int(out), most_output)) for p, out in lengths]

    return {
        "single": samples(1, 5, sampled=False),
        "samples-8": samples(8, 3),
        "samples-32": samples(32, 2),
        "samples-64": samples(64, 2),
        "samples-256": samples(256, 1),
        "requests-64": {"warm_up": different(8, WARM_UP_TOKENS), "batches": [different(64, 120)]},
    }


def count_tokens(name: str, case: dict[str, Any], result: dict[str, Any]) -> int:
    """Tokens of a run.

    Raises:
        UserError: an answer is shorter or longer than asked for.
    """
    asked = [[r["output"]] * r["n"] for batch in case["batches"] for r in batch]
    given = [[len(tokens) for tokens in choices] for choices in result["tokens"]]
    if asked != given:
        raise UserError(f"{name}: asked for {asked} tokens, got {given}")
    return sum(map(sum, asked))


def arguments(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """The flags that both comparisons of engines have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=PEER_DTYPES, default="fp32")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    return parser


def show_medians(options: argparse.Namespace, peer: str, rates: dict[str, dict[str, list[float]]]) -> None:
    """A table of the tokens per second of both sides in each case."""
    where = f"{options.threads} threads" if options.device == "cpu" else options.device
    print(f"\n{options.dtype}, depth {options.depth}, {where}, medians of {options.rounds} rounds\n")
    print(f"| case | {peer}, tokens/s | ours, tokens/s | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for name, sides in rates.items():
        theirs, ours = (statistics.median(sides[side]) for side in ("peer", "ours"))
        print(f"| {name} | {theirs:,.0f} | {ours:,.0f} | {ours / theirs:.2f} |")


def main() -> int:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of karpathy/nanochat")
    parser.add_argument(
        "--cases",
        default="single,samples-8,samples-32,requests-64",
        help="comma separated; samples-64 and samples-256 too",
    )
    options = parser.parse_args()
    everything = cases(options.vocab_size, options.seed)
    chosen = options.cases.split(",")
    if unknown := set(chosen) - everything.keys():
        raise UserError(f"--cases has {', '.join(sorted(unknown))}; choose of {', '.join(everything)}")
    config = ModelConfig.from_depth(
        options.depth,
        vocab_size=options.vocab_size,
        head_dim=options.head_dim,
        context_length=options.context_length,
    )
    rates: dict[str, dict[str, list[float]]] = {name: {"peer": [], "ours": []} for name in chosen}
    different: list[str] = []
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        task = {
            "config": peer_config(config),
            "folder": str(folder / "weights"),
            "cases": {name: everything[name] for name in chosen},
            "device": options.device,
            "threads": options.threads,
            "dtype": options.dtype,
            "seed": options.seed,
            "result": str(folder / "result.json"),
        }
        run_peer(options.peer, "weights", task, folder, options.dtype)
        for number in range(1, options.rounds + 1):
            results = {}
            # Whoever comes first changes from round to round.
            for side in ("peer", "ours") if number % 2 else ("ours", "peer"):
                if side == "peer":
                    run_peer(options.peer, "serve", task, folder, options.dtype)
                else:
                    run_ours("our_engine_process", task, folder)
                results[side] = json.loads((folder / "result.json").read_bytes())
            for name in chosen:
                for side, result in results.items():
                    tokens = count_tokens(name, everything[name], result[name])
                    rates[name][side].append(tokens / result[name]["seconds"])
                peer, ours = (rates[name][side][-1] for side in ("peer", "ours"))
                print(f"round {number}: {name:<11} peer {peer:7.0f}, ours {ours:7.0f} tokens/s", flush=True)
                greedy = everything[name]["batches"][0][0]["temperature"] == 0
                if (
                    greedy
                    and options.dtype == "fp32"
                    and results["peer"][name]["tokens"] != results["ours"][name]["tokens"]
                ):
                    different.append(f"round {number}, {name}")
    show_medians(options, "peer", rates)
    if options.dtype == "fp32":
        print(f"\ngreedy tokens: {'differ in ' + '; '.join(different) if different else 'the same on both sides'}")
    return 1 if different else 0


if __name__ == "__main__":
    run_main(main, "bench_engine_peer.py")
