"""Start both sides of a comparison with karpathy/nanochat (the peer) and prepare the data of a training run."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jobs.eval.bench.models import random_tokenizer
from jobs.train.batches.loader import PackedLoader
from jobs.train.batches.sources import TextSource
from jobs.train.loop.schedule import Schedule
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import Tokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Both sides compile in the first steps, so these steps are not timed.
WARMUP_STEPS = 3
PEER_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
ROWS = 32
# This much text is enough for a vocabulary of 4096. More text would only take longer.
TOKENIZER_CHARACTERS = 10_000_000


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of a training run.

    Attributes:
        seconds: duration of each step.
        losses: loss of each step in nats.
        evaluations: (step, bits per byte) of each evaluation.
    """

    seconds: list[float]
    losses: list[float]
    evaluations: list[tuple[int, float]]

    def tokens_per_second(self, tokens: int) -> float:
        """Return the speed of the steps after the warm-up. Each step has ``tokens`` tokens."""
        timed = self.seconds[WARMUP_STEPS:]
        return tokens * len(timed) / sum(timed)


def arguments(description: str | None, *, needs_data: bool = True) -> argparse.ArgumentParser:
    """Return a parser with the flags that all training comparisons share.

    Unless a comparison ``needs_data``, random token ids take the place of missing data.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of karpathy/nanochat")
    parser.add_argument("--data", type=Path, required=needs_data, help="folder of parquet shards with a text column")
    parser.add_argument("--dtype", choices=PEER_DTYPES, default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context-length", type=int, default=256)
    parser.add_argument("--window-pattern", default="L", help="the peer recommends L on CPUs and uses it in runcpu.sh")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--lr-scale", type=float, default=0.8, help="factor on all learning rates except those of smear and backout"
    )
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=42)
    return parser


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Settings, model shape and tokenizer that both sides share. The data files are in ``folder``."""

    options: argparse.Namespace
    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer

    @classmethod
    def prepare(cls, options: argparse.Namespace, folder: Path, *, batches: int, validation_rows: int) -> Comparison:
        """Train the tokenizer, and pack the training rows and the validation rows. All runs use these files.

        Without data, the rows have random token ids. Then only the speeds can be compared.
        """
        config = ModelConfig.from_depth(
            options.depth,
            vocab_size=options.vocab_size,
            head_dim=options.head_dim,
            context_length=options.context_length,
            window_pattern=options.window_pattern,
        )
        shapes = ((batches, ROWS), (1, validation_rows))
        if options.data is None:
            comparison = cls(options, folder, config, random_tokenizer(options.vocab_size))
            draw, width = np.random.default_rng(options.seed), config.context_length + 1
            rows = [draw.integers(options.vocab_size, size=(*shape, width), dtype=np.int32) for shape in shapes]
        else:
            # A machine with a GPU may lack the packages that read text and train tokenizers.
            from jobs.data.local_text import LocalText
            from jobs.train.tokenizer import limited, train_tokenizer

            texts = [list(texts) for texts in LocalText(options.data).documents()]
            tokenizer = train_tokenizer(limited(texts[0], 10_000, TOKENIZER_CHARACTERS), options.vocab_size)
            comparison = cls(options, folder, config, tokenizer)
            rows = [comparison._packed(each, *shape) for each, shape in zip(texts, shapes, strict=True)]
        (folder / "tokenizer.json").write_text(comparison.tokenizer.to_json())
        np.save(folder / "batches.npy", rows[0])
        np.save(folder / "validation.npy", rows[1][0])
        return comparison

    @property
    def tokens_per_step(self) -> int:
        return ROWS * self.config.context_length

    def train(self, side: Literal["peer", "ours"], steps: int, **changes: Any) -> Result:
        """Train one side in a new process. ``changes`` replaces fields of the default task."""
        options, scale = self.options, self.options.lr_scale
        # Both sides follow this schedule. It equals the peer's schedule for runs of at most 400 steps: in such runs,
        # the momentum rises until the end.
        schedule = Schedule(steps, momentum_end=None if steps <= 400 else 0.90)
        task = {
            "config": peer_config(self.config),
            "batches": str(self.folder / "batches.npy"),
            "validation": str(self.folder / "validation.npy"),
            "tokenizer": str(self.folder / "tokenizer.json"),
            "token_bytes": self.tokenizer.bytes_per_token,
            "rates": {
                "unembedding_lr": 0.008 * scale,
                "embedding_lr": 0.3 * scale,
                "matrix_lr": 0.02 * scale,
                "scalar_lr": 0.5 * scale,
                "weight_decay": options.weight_decay,
            },
            "lr_scale": scale,
            "weight_decay": options.weight_decay,
            "schedule": {
                name: [getattr(schedule, name)(step) for step in range(steps)]
                for name in ("lr", "momentum", "weight_decay")
            },
            "momentum_end": schedule.momentum_end,
            "steps": steps,
            "seconds": math.inf,
            "warmup": WARMUP_STEPS,
            "evaluate_every": 0,
            "initial": None,
            "threads": options.threads,
            "seed": options.seed,
            "dtype": options.dtype,
            "device": options.device,
            "result": str(self.folder / "result.json"),
        } | changes
        if side == "peer":
            run_peer(options.peer, "train", task, self.folder, options.dtype)
        else:
            run_ours("our_process", task, self.folder)
        return Result(**json.loads((self.folder / "result.json").read_bytes()))

    def _packed(self, texts: list[str], batches: int, rows: int) -> np.ndarray:
        """Pack the texts into token ids: int32, shape (batches, rows, context + 1)."""
        loader = PackedLoader(
            TextSource(texts, self.tokenizer),  # type: ignore[arg-type]
            rows=rows,
            context_length=self.config.context_length,
            pad_id=self.tokenizer.bos_id,
        )
        made = (loader.next_batch() for _ in range(batches))
        # The peer has no uncounted targets, so 0 replaces an uncounted target at the end of a row.
        return np.stack(
            [
                np.concatenate([b.ids.numpy(), np.maximum(b.targets.numpy()[:, -1:], 0)], axis=1).astype(np.int32)
                for b in made
            ]
        )


def peer_config(config: ModelConfig) -> dict[str, Any]:
    """Convert a model configuration to the peer's."""
    return {
        "sequence_len": config.context_length,
        "vocab_size": config.vocab_size,
        "n_layer": config.depth,
        "n_head": config.n_head,
        "n_kv_head": config.n_kv_head,
        "n_embd": config.dim,
        "window_pattern": config.window_pattern,
    }


def run_peer(peer: Path, name: str, task: dict[str, Any], folder: Path, dtype: str = "fp32") -> None:
    """Run the task ``name`` of peer_process.py with the checkout ``peer``.

    Raises:
        UserError: the process failed. The message contains its output.
    """
    if not (peer / "nanochat" / "gpt.py").is_file():
        raise UserError(f"{peer} is not a checkout of karpathy/nanochat")
    environment = {
        "PYTHONPATH": str(peer.resolve()),
        "NANOCHAT_BASE_DIR": str(folder),
        "NANOCHAT_DTYPE": PEER_DTYPES[dtype],
    }
    _run([str(HERE / "peer_process.py"), name, str(_written(folder, name, task))], folder, environment)


def run_ours(module: str, task: dict[str, Any], folder: Path) -> None:
    """Run the program ``module`` of this package on the task.

    Raises:
        UserError: the process failed. The message contains its output.
    """
    _run(["-m", f"{__package__}.{module}", str(_written(folder, "ours", task))], ROOT, {})


def run_program(module: str, flags: list[str]) -> None:
    """Run a program of this project, such as ``jobs.train.pretrain``.

    Raises:
        UserError: the process failed. The message contains its output.
    """
    _run(["-m", module, *flags], ROOT, {})


def run_with(packages: Path, script: str, task: dict[str, Any], folder: Path) -> None:
    """Run ``script`` of this folder on the task, with the packages in the folder ``packages``.

    Raises:
        UserError: the process failed. The message contains its output.
    """
    environment = {"PYTHONPATH": str(packages.resolve())}
    _run([str(HERE / script), str(_written(folder, "theirs", task))], folder, environment)


def _written(folder: Path, name: str, task: dict[str, Any]) -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(task))
    return path


def _run(arguments: list[str], cwd: Path, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
