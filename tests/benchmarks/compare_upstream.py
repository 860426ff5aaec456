"""Compare the logits of imported models with the logits that karpathy/nanochat (the peer) computes.

Run the program from the project's root: ``python -m tests.benchmarks.compare_upstream --peer PATH``. For each shape,
the peer creates a model with random weights, including output projections and scalars. It saves the model and a
tokenizer in its own layout and computes logits in fp32. This program imports the saved folder and computes the
logits again.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from jobs.train.import_nanochat import ImportSettings, import_checkpoint
from nanochat_core.checkpoint import load_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.errors import run_main
from nanochat_core.store import open_store
from tests.benchmarks.peer import peer_config, run_peer


def shape(depth: int, head_dim: int, pattern: str, *, kv: int | None = None, vocab: int = 512) -> ModelConfig:
    """Return a model shape with a context of 512 tokens and short windows of 128 tokens."""
    return ModelConfig.from_depth(
        depth, vocab_size=vocab, head_dim=head_dim, context_length=512, n_kv_head=kv, window_pattern=pattern
    )


# Each entry has the model's shape and the number of tokens of a row.
CASES = [
    (shape(4, 64, "SSSL"), 512),
    (shape(4, 64, "L"), 512),
    (shape(4, 64, "SSSL"), 333),
    (shape(4, 64, "L"), 333),
    (shape(4, 128, "SSSL"), 257),
    (shape(8, 128, "SL"), 511),
    (shape(4, 64, "SSSL", kv=2), 301),
    (shape(4, 64, "SSSL", kv=1), 512),
    (shape(5, 64, "SSL", vocab=389), 129),
    (shape(1, 64, "S"), 2),
]


def difference(peer: Path, config: ModelConfig, time: int, folder: Path) -> tuple[float, float, float]:
    """Import a model of the peer and compare its logits with the peer's.

    Returns:
        The largest absolute difference, that difference divided by the largest logit, and the standard deviation of
        the peer's logits.
    """
    theirs = folder / "theirs"
    task = {"config": peer_config(config), "time": time, "seed": time, "folder": str(theirs)}
    run_peer(peer, "logits", task, folder)
    home = str(folder / "home")
    ref = import_checkpoint(
        ImportSettings(folder=str(theirs), tokenizer_folder=str(theirs / "tokenizer"), model="theirs", home=home)
    )
    saved = np.load(theirs / "logits.npz")
    model = load_checkpoint(open_store(home), ref).build_model()
    with torch.inference_mode():
        ours = model(torch.from_numpy(saved["ids"])).numpy()
    largest = float(np.abs(ours - saved["logits"]).max())
    return largest, largest / float(np.abs(saved["logits"]).max()), float(saved["logits"].std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of karpathy/nanochat")
    options = parser.parse_args()
    print("| depth | heads | kv heads | head_dim | windows | vocabulary | tokens | max abs | max rel | logits' std |")
    print("| ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for config, time in CASES:
        with tempfile.TemporaryDirectory() as folder:
            absolute, relative, std = difference(options.peer, config, time, Path(folder))
        print(
            f"| {config.depth} | {config.n_head} | {config.n_kv_head} | {config.head_dim} | {config.window_pattern} "
            f"| {config.vocab_size} | {time} | {absolute:.1e} | {relative:.1e} | {std:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    run_main(main, "compare_upstream.py")
