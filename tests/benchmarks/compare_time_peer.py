"""Compare held-out bits per byte with karpathy/nanochat (the peer) after equal training time.

Run the program from the project's root: ``python -m tests.benchmarks.compare_time_peer --peer PATH --data FOLDER``.

Each side trains with its own program as a user starts it: ``jobs.train.pretrain``, and the peer's
``scripts/base_train.py``. So each side has its own loader, optimizer, initial weights and loop. Both read the same
shards with the same tokenizer and have the same shape of model, learning rates, weight decay and share of warmup steps.
The momentum's warmup differs, because the peer has no flag for it. ``--our-flags`` and ``--peer-flags`` change further
settings of one side.

A run has as many steps as fit into the time budget, and its schedule is planned for this number of steps. The number
follows from the mean duration of a step in the previous run of the same side. The first run of each side is short: it
only measures this duration. The time is that of optimizer steps, including the wait for their batches. It excludes
starting and reading. The first three steps compile; the time counts each of them with the mean duration of the other
steps. The table also has the duration of the whole process. At the end, one program evaluates the checkpoints of both
sides on the same held-out documents: on whole documents, and on their first rows.
"""

import argparse
import dataclasses
import itertools
import json
import shlex
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

from jobs.data.local_text import LocalText
from jobs.data.shards import TextDataset, write_dataset
from jobs.data.tokenizers import save_tokenizer
from jobs.measures.bits_per_byte import bits_per_byte
from jobs.train.import_nanochat import ImportSettings, import_checkpoint
from jobs.train.loop.schedule import REFERENCE_BATCH_TOKENS
from jobs.train.tokenizer import limited, train_tokenizer
from jobs.train.upstream.export import write_tokenizer
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.device import prepare_cpu
from nanochat_core.errors import run_main
from nanochat_core.store import Store, open_store
from nanochat_core.tokenizer import Tokenizer
from tests.benchmarks.compare_packing import first_rows
from tests.benchmarks.peer import TOKENIZER_CHARACTERS, WARMUP_STEPS, run_peer, run_program

Side = Literal["ours", "peer"]
SIDES: tuple[Side, Side] = ("ours", "peer")
DATASET = "compared"
HEAD_DIM = 64
# --lr-scale applies to a batch of this many tokens. The learning rates grow with the square root of the batch size.
BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run and its checkpoint. A checkpoint of the peer has been imported into the store.

    Attributes:
        seconds: duration of each step.
        process_seconds: duration of the whole process.
    """

    checkpoint: CheckpointRef
    seconds: list[float]
    process_seconds: float

    @property
    def step_seconds(self) -> float:
        """Mean duration of the steps that do not compile."""
        return statistics.mean(self.seconds[WARMUP_STEPS:])


class Comparison:
    """The data that both sides share, and the runs of both sides. All files are in ``folder``."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._options, self._folder, self._runs = options, folder, 0
        self._store = open_store(str(folder / "home"))
        training, validation = (list(texts) for texts in LocalText(options.data).documents())
        write_dataset(self._store, DATASET, training, validation, source=str(options.data))
        self.tokenizer = train_tokenizer(limited(training, 10_000, TOKENIZER_CHARACTERS), options.vocab_size)
        save_tokenizer(self._store, DATASET, self.tokenizer, DATASET)
        write_tokenizer(self.tokenizer, folder / "tokenizer")
        # The peer looks here for shards. Like this project, it uses the last shard for validation.
        (folder / "base_data_climbmix").symlink_to(folder / "home" / "data" / DATASET)

    @property
    def store(self) -> Store:
        return self._store

    def held_out(self) -> list[str]:
        """Every n-th held-out document, about as many characters as ``--held-out-characters`` says."""
        documents = list(TextDataset(self._store, DATASET, "val"))
        every = max(1, sum(map(len, documents)) // self._options.held_out_characters)
        return documents[::every]

    def run(self, side: Side, depth: int, seed: int, steps: int) -> Run:
        self._runs += 1
        model = f"{side}-{self._runs}"
        started = time.perf_counter()
        if side == "ours":
            run_program("jobs.train.pretrain", self._our_flags(model, depth, seed, steps))
            whole = time.perf_counter() - started
            checkpoint = CheckpointRef(model, "base", steps)
            history = load_checkpoint(self._store, checkpoint).meta["history"]
            ends = [0.0, *(point["train_seconds"] for point in history if "loss" in point)]
            return Run(checkpoint, [end - start for start, end in itertools.pairwise(ends)], whole)
        task = {
            "arguments": self._peer_flags(model, depth, steps),
            "seed": seed,
            "threads": self._options.threads,
            "result": str(self._folder / "result.json"),
        }
        run_peer(self._options.peer, "base_train", task, self._folder)
        whole = time.perf_counter() - started
        checkpoint = import_checkpoint(
            ImportSettings(
                folder=str(self._folder / "base_checkpoints" / model),
                tokenizer_folder=str(self._folder / "tokenizer"),
                model=model,
                home=str(self._folder / "home"),
            )
        )
        return Run(checkpoint, json.loads((self._folder / "result.json").read_bytes()), whole)

    def batch_tokens(self, side: Side) -> int:
        rows: int = self._options.our_rows if side == "ours" else self._options.peer_rows
        return rows * self._options.context_length

    def _our_flags(self, model: str, depth: int, seed: int, steps: int) -> list[str]:
        options = self._options
        flags = {
            "home": self._folder / "home",
            "model": model,
            "dataset": DATASET,
            "tokenizer": DATASET,
            "seed": seed,
            "depth": depth,
            "head-dim": HEAD_DIM,
            "context-length": options.context_length,
            "window-pattern": options.window_pattern,
            "steps": steps,
            "batch-tokens": self.batch_tokens("ours"),
            "device-batch-rows": options.our_rows,
            "lr-scale": self._lr_scale("ours"),
            "weight-decay": options.weight_decay,
            "warmup-steps": self._warmup_steps(steps),
            "momentum-warmup-steps": max(1, round(options.our_momentum_warmup * steps)),
            "dtype": "fp32",
            "threads": options.threads,
            "save-every": 0,
            "eval-every": 0,
            "eval-tokens": 1,
        }
        return [f"--{name}={value}" for name, value in flags.items()] + shlex.split(options.our_flags)

    def _peer_flags(self, model: str, depth: int, steps: int) -> list[str]:
        options, tokens, scale = self._options, self.batch_tokens("peer"), self._lr_scale("peer")
        # base_train.py multiplies the learning rates and the weight decay by these factors.
        batch = (tokens / REFERENCE_BATCH_TOKENS) ** 0.5
        sizes = [
            ModelConfig.from_depth(d, vocab_size=self.tokenizer.vocab_size, head_dim=HEAD_DIM).scaling_parameters
            for d in (12, depth)
        ]
        flags = {
            "model-tag": model,
            "depth": depth,
            "head-dim": HEAD_DIM,
            "max-seq-len": options.context_length,
            "window-pattern": options.window_pattern,
            "num-iterations": steps,
            "total-batch-size": tokens,
            "device-batch-size": options.peer_rows,
            "embedding-lr": 0.3 * scale / batch,
            "unembedding-lr": 0.008 * scale / batch,
            "matrix-lr": 0.02 * scale / batch,
            "scalar-lr": 0.5 * scale / batch,
            "weight-decay": options.weight_decay / (batch * sizes[0] / sizes[1]),
            "warmup-steps": self._warmup_steps(steps),
            "eval-every": -1,
            "core-metric-every": -1,
            "sample-every": -1,
        }
        return [f"--{name}={value}" for name, value in flags.items()] + shlex.split(options.peer_flags)

    def _lr_scale(self, side: Side) -> float:
        scale: float = self._options.lr_scale
        return scale * (self.batch_tokens(side) / BATCH_TOKENS) ** 0.5

    def _warmup_steps(self, steps: int) -> int:
        return max(1, min(40, round(self._options.warmup * steps)))


def evaluated(store: Store, run: Run, tokenizer: Tokenizer, held_out: list[str]) -> tuple[float, float]:
    """Return a run's bits per byte on whole documents and on their first rows."""
    model = load_checkpoint(store, run.checkpoint).build_model()
    firsts = first_rows(held_out, tokenizer, model.config.context_length)
    whole, first = (bits_per_byte(model, tokenizer, texts, rows=32) for texts in (held_out, firsts))
    return whole, first


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of karpathy/nanochat")
    parser.add_argument("--data", type=Path, required=True, help="folder of text")
    parser.add_argument("--depths", default="4,6")
    parser.add_argument("--budgets", default="90,120", help="seconds of training for each depth")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--our-rows", type=int, default=32, help="rows in a batch")
    parser.add_argument("--peer-rows", type=int, default=32, help="rows in a batch of the peer")
    parser.add_argument("--window-pattern", default="L", help="the peer recommends L on CPUs and uses it in runcpu.sh")
    parser.add_argument("--lr-scale", type=float, default=0.8, help=f"of a batch of {BATCH_TOKENS} tokens")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps, at most 40 steps")
    parser.add_argument("--our-momentum-warmup", type=float, default=0.4, help="share of the steps")
    parser.add_argument("--our-flags", default="", help="further flags of jobs.train.pretrain")
    parser.add_argument("--peer-flags", default="", help="further flags of base_train.py")
    parser.add_argument("--held-out-characters", type=int, default=400_000)
    parser.add_argument("--short-steps", type=int, default=12, help="steps of the first run, which only measures time")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    options = parse()
    prepare_cpu(options.threads)
    results: dict[tuple[int, Side], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as path:
        comparison = Comparison(options, Path(path))
        held_out = comparison.held_out()
        print("| depth | seed | side | steps | tokens | seconds | tokens/s | process | bits per byte | of first rows |")
        print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for depth, budget in zip(options.depths.split(","), options.budgets.split(","), strict=True):
            last = {side: comparison.run(side, int(depth), 0, options.short_steps) for side in SIDES}
            for number, seed in enumerate(options.seeds.split(",")):
                # The sides take turns at running first.
                for side in SIDES if number % 2 else reversed(SIDES):
                    steps = max(WARMUP_STEPS + 1, round(float(budget) / last[side].step_seconds))
                    last[side] = run = comparison.run(side, int(depth), int(seed), steps)
                    found = evaluated(comparison.store, run, comparison.tokenizer, held_out)
                    results.setdefault((int(depth), side), []).append(found)
                    tokens = comparison.batch_tokens(side)
                    print(
                        f"| {depth} | {seed} | {side} | {steps} | {steps * tokens:,} | {steps * run.step_seconds:.1f} "
                        f"| {tokens / run.step_seconds:,.0f} | {run.process_seconds:.1f} s | {found[0]:.4f} "
                        f"| {found[1]:.4f} |",
                        flush=True,
                    )
    show(results)


def show(results: dict[tuple[int, Side], list[tuple[float, float]]]) -> None:
    """Print each side's mean over the seeds, and the difference of this project from the peer in percent."""
    print("\n| depth | text | peer | ours | difference | of each seed |")
    print("| ---: | --- | ---: | ---: | ---: | --- |")
    for depth in dict.fromkeys(depth for depth, _ in results):
        for column, text in enumerate(("whole documents", "first rows")):
            ours, peer = ([found[column] for found in results[depth, side]] for side in SIDES)
            means = statistics.mean(peer), statistics.mean(ours)
            each = ", ".join(f"{own / theirs - 1:+.2%}" for own, theirs in zip(ours, peer, strict=True))
            print(f"| {depth} | {text} | {means[0]:.4f} | {means[1]:.4f} | {means[1] / means[0] - 1:+.2%} | {each} |")


if __name__ == "__main__":
    run_main(main, "compare_time_peer")
