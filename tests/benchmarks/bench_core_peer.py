"""Compare this project's CORE evaluation with that of karpathy/nanochat (the peer): accuracies and duration.

Run the program from the project's root:
``python -m tests.benchmarks.bench_core_peer --peer PATH --bundle FOLDER --max-per-task 100``.

The peer trains a tokenizer, trains a model on the bundle's text for a few steps, and saves both in its own layout. This
project imports them. Then both sides evaluate the same files in alternating runs, each in a new process and in fp32.
The peer uses ``evaluate_core`` of its ``base_eval.py`` without torch.compile, just like ``base_eval.py`` itself.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from jobs.measures.core.bundle import open_bundle, read_bundle
from jobs.train.import_nanochat import ImportSettings, import_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.errors import run_main
from tests.benchmarks.peer import peer_config, run_ours, run_peer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of karpathy/nanochat")
    parser.add_argument("--bundle", type=Path, required=True, help="folder of an evaluation bundle")
    parser.add_argument("--max-per-task", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=60, help="training steps of the model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    bundle = read_bundle(open_bundle(str(options.bundle)), options.max_per_task)
    config = ModelConfig.from_depth(
        options.depth, vocab_size=options.vocab_size, head_dim=64, context_length=options.context_length
    )
    runs: dict[str, list[dict[str, Any]]] = {"peer": [], "ours": []}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        (folder / "eval_bundle").symlink_to(options.bundle.resolve())
        texts = [item.shown for task in read_bundle(open_bundle(str(options.bundle))).tasks for item in task.items]
        (folder / "texts.json").write_text(json.dumps(texts))
        task = {
            "config": peer_config(config),
            "folder": str(folder / "weights"),
            "texts": str(folder / "texts.json"),
            "steps": options.steps,
            "home": str(folder / "home"),
            "model": "theirs",
            "bundle": str(options.bundle.resolve()),
            "max_per_task": options.max_per_task,
            "threads": options.threads,
            "seed": options.seed,
            "result": str(folder / "result.json"),
        }
        run_peer(options.peer, "core_weights", task, folder)
        weights = folder / "weights"
        import_checkpoint(
            ImportSettings(
                folder=str(weights),
                tokenizer_folder=str(weights / "tokenizer"),
                model="theirs",
                home=str(folder / "home"),
            )
        )
        for number in range(1, options.rounds + 1):
            # The two sides take turns at running first.
            for side in ("peer", "ours") if number % 2 else ("ours", "peer"):
                if side == "peer":
                    run_peer(options.peer, "core", task, folder)
                else:
                    run_ours("our_core_process", task, folder)
                runs[side].append(json.loads((folder / "result.json").read_bytes()))
                print(f"round {number}: {side} {runs[side][-1]['seconds']:.1f} s", flush=True)
    return show(runs, {task.label: len(task.items) for task in bundle.tasks})


def show(runs: dict[str, list[dict[str, Any]]], examples: dict[str, int]) -> int:
    """Print the table of results. Return the exit code: 1 if any accuracy differs, else 0."""
    different = []
    print("\n| task | examples | accuracy, peer | accuracy, ours | peer, s | ours, s | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for label, items in examples.items():
        seconds = {
            side: statistics.median(run["tasks"][label]["seconds"] for run in each) for side, each in runs.items()
        }
        # The peer computes the accuracy in fp32. The count of correct answers is exact, so this program compares the
        # counts.
        right = {side: {round(run["tasks"][label]["accuracy"] * items) for run in each} for side, each in runs.items()}
        if right["peer"] != right["ours"] or len(right["peer"]) > 1:
            different.append(label)
        peer, ours = (" ".join(f"{number / items:.4f}" for number in sorted(right[side])) for side in ("peer", "ours"))
        print(
            f"| {label} | {items} | {peer} | {ours} | {seconds['peer']:.2f} | {seconds['ours']:.2f} "
            f"| {seconds['peer'] / seconds['ours']:.2f} |"
        )
    whole = {side: statistics.median(run["seconds"] for run in each) for side, each in runs.items()}
    core = {side: each[0]["core"] for side, each in runs.items()}
    print(
        f"| all | {sum(examples.values())} | {core['peer']:.6f} | {core['ours']:.6f} | {whole['peer']:.2f} "
        f"| {whole['ours']:.2f} | {whole['peer'] / whole['ours']:.2f} |"
    )
    print(f"\naccuracies: {'differ in ' + ', '.join(different) if different else 'the same on both sides'}")
    return 1 if different else 0


if __name__ == "__main__":
    run_main(main, "bench_core_peer.py")
