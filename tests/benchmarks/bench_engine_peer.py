"""Compare the speed of this project's inference engine and of karpathy/nanochat's engine (the peer).

Run the program from the project's root:
``python -m tests.benchmarks.bench_engine_peer --peer PATH --dtype fp32 --rounds 5``.

Both sides use the same random weights and alternate. Each run is a new process that loads the weights. For each case,
the process first answers a few warm-up requests. Then it answers the requests of the case, and these are timed.

Both sides receive the same prompts and generate exactly the same number of tokens. In fp32, greedy tokens must be
equal. The peer runs as in its ``chat_cli.py``: ``Engine.generate`` without torch.compile, read to the end. On a CPU the
peer stores its weights in fp32; if it computes in bf16, it casts the weights in every pass.

The peer's engine prefills one prompt and decodes only samples of that prompt, so it answers 64 different requests one
after another. Grouping prompts of equal length would require another engine around the peer's network and would gain
little: 64 prompts of 10 to 200 tokens have about 54 different lengths.
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

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 128
WARM_UP_TOKENS = 16


def request(prompt: np.ndarray, output: int, n: int = 1, *, sampled: bool = False) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "top_k": 50} if sampled else {"temperature": 0.0, "top_k": None}
    return {"prompt": prompt.tolist(), "output": output, "n": n, **sampling}


def cases(vocab_size: int, seed: int) -> dict[str, dict[str, Any]]:
    """Return the warm-up requests and the batches of timed requests of each case.

    The batches run one after another. A side may answer the requests of one batch in any order or all together. All
    prompts differ, so our prefix cache never helps.
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
    """Return the number of tokens that a run generated for the case.

    Raises:
        UserError: an answer does not have the requested length.
    """
    asked = [[r["output"]] * r["n"] for batch in case["batches"] for r in batch]
    given = [[len(tokens) for tokens in choices] for choices in result["tokens"]]
    if asked != given:
        raise UserError(f"{name}: asked for {asked} tokens, got {given}")
    return sum(map(sum, asked))


def arguments(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with the flags that both engine comparisons share."""
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
    """Print a table with the median tokens per second of both sides in each case."""
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
        help="comma-separated cases; samples-64 and samples-256 are also available",
    )
    options = parser.parse_args()
    everything = cases(options.vocab_size, options.seed)
    chosen = options.cases.split(",")
    if unknown := set(chosen) - everything.keys():
        raise UserError(f"--cases has {', '.join(sorted(unknown))}; choose from {', '.join(everything)}")
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
            # The two sides take turns at running first.
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
