"""Compare the speed of the inference engine with the continuous batching of Hugging Face's transformers.

Run the program from the project's root:
``python -m tests.benchmarks.bench_engine_transformers --transformers FOLDER``.
The command ``pip install --target FOLDER transformers`` fills ``FOLDER``. Both sides use this project's torch.

The networks differ, because transformers runs a Llama. They have equal depth, width, heads and vocabulary, and equally
many weights in the MLP. Both sides receive the same prompts at once, decode greedily and generate equally many tokens.
The sides alternate. Each run is a new process that first answers a few warm-up requests. The transformers side also
answers the first batch once as a warm-up, because its prefix cache is off.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError, run_main
from tests.benchmarks.bench_engine_peer import WARM_UP_TOKENS, arguments, cases, count_tokens, request, show_medians
from tests.benchmarks.peer import run_ours, run_with

# Each batch size gets this many requests in total. A batch size above this number gets a single batch.
_REQUESTS = 16


def main() -> int:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument(
        "--transformers", type=Path, required=True, help="folder with the installed package transformers"
    )
    parser.add_argument("--batches", default="1,8,64", help="batch sizes, comma-separated")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=128)
    options = parser.parse_args()
    if not (options.transformers / "transformers").is_dir():
        raise UserError(
            f"{options.transformers} does not contain the package transformers; install it with pip install --target"
        )
    draw = np.random.default_rng(options.seed)

    def batch(size: int, output: int) -> list[dict[str, object]]:
        prompts = draw.integers(options.vocab_size, size=(size, options.prompt_tokens))
        return [request(prompt, output) for prompt in prompts]

    everything = {
        f"{size} at once": {
            "warm_up": batch(size, WARM_UP_TOKENS),
            "batches": [batch(size, options.output_tokens) for _ in range(max(_REQUESTS // size, 1))],
        }
        for size in map(int, options.batches.split(","))
    }
    everything["64 of many lengths"] = cases(options.vocab_size, options.seed)["requests-64"]
    shape = {name: getattr(options, name) for name in ("depth", "head_dim", "vocab_size", "context_length")}
    rates: dict[str, dict[str, list[float]]] = {name: {"peer": [], "ours": []} for name in everything}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        task = {
            **shape,
            "dim": ModelConfig.from_depth(**shape).dim,
            "cases": everything,
            "device": options.device,
            "dtype": options.dtype,
            "threads": options.threads,
            "seed": options.seed,
            "result": str(folder / "result.json"),
        }
        for number in range(1, options.rounds + 1):
            # The two sides take turns at running first.
            for side in ("peer", "ours") if number % 2 else ("ours", "peer"):
                if side == "peer":
                    run_with(options.transformers, "transformers_process.py", task, folder)
                else:
                    run_ours("our_engine_process", task, folder)
                result = json.loads((folder / "result.json").read_bytes())
                for name, case in everything.items():
                    tokens = count_tokens(name, case, result[name])
                    rates[name][side].append(tokens / result[name]["seconds"])
            for name, sides in rates.items():
                theirs, ours = (sides[side][-1] for side in ("peer", "ours"))
                print(f"round {number}: {name:<18} transformers {theirs:7.0f}, ours {ours:7.0f} tokens/s", flush=True)
    show_medians(options, "transformers", rates)
    return 0


if __name__ == "__main__":
    run_main(main, "bench_engine_transformers.py")
