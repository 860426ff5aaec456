"""Train with ``jobs.train.loop.trainer`` on batches from a file. The training comparisons start this program."""

import json
import math
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.train.batches.loader import Batch
from jobs.train.loop.kernels import make_trainable
from jobs.train.loop.run import Evaluation, RunConfig
from jobs.train.loop.runtime import RunSettings, Runtime
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.trainer import Trainer
from jobs.train.upstream.checkpoint import convert, model_config, read_upstream
from nanochat_core.config import ModelConfig
from nanochat_core.device import DTYPES, prepare_cpu
from nanochat_core.model import GPT
from nanochat_core.store import open_store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, muon_dtype, parameter_groups


class ArrayBatches:
    """Replaces the loader: repeats the batches of an array of token ids, shape (batches, rows, time + 1)."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = torch.from_numpy(rows.astype(np.int64))

    def prefetched(self) -> Generator[Batch, None, None]:
        while True:
            for rows in self._rows:
                yield Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), {"of": 1, "packers": {}})


def shape(config: dict[str, Any]) -> ModelConfig:
    """Convert the peer's model configuration to ours."""
    return ModelConfig(
        depth=config["n_layer"],
        dim=config["n_embd"],
        n_head=config["n_head"],
        n_kv_head=config["n_kv_head"],
        head_dim=config["n_embd"] // config["n_head"],
        context_length=config["sequence_len"],
        vocab_size=config["vocab_size"],
        window_pattern=config["window_pattern"],
    )


@torch.inference_mode()
def bits_per_byte(model: GPT, rows: torch.Tensor, token_bytes: torch.Tensor) -> float:
    nats, total = 0.0, 0
    for some in rows.split(32):
        targets = some[:, 1:].contiguous()
        lengths = token_bytes[targets]
        losses = model.loss(some[:, :-1].contiguous(), targets, "none").view_as(targets)
        nats += float((losses * (lengths > 0)).sum())
        total += int(lengths.sum())
    return nats / math.log(2) / total


def train(task: dict[str, Any], home: str) -> dict[str, Any]:
    prepare_cpu(task["threads"])
    device = torch.device(task["device"])
    torch.manual_seed(task["seed"])
    model = GPT(shape(task["config"]), DTYPES[task["dtype"]])
    model.init_weights()
    if task["initial"]:
        source = read_upstream(Path(task["initial"]), 0)
        model.load_state_dict(convert(source, model_config(source)).state_dict())
    model.to(device)
    make_trainable(model, RunSettings(), device, task["dtype"])
    config = OptimizerConfig(weight_decay=task["weight_decay"])
    validation = torch.from_numpy(np.load(task["validation"]).astype(np.int64)).to(device)
    token_bytes = torch.tensor(task["token_bytes"], device=device)
    batches = np.load(task["batches"])
    settings = RunSettings(
        device_batch_rows=batches.shape[1], save_every=0, eval_every=task["evaluate_every"], compile=True
    )
    schedule = Schedule(task["steps"], momentum_end=task["momentum_end"])
    trainer = Trainer(
        RunConfig("compared", "base", schedule, settings, meta={"settings": {}, "inputs": {}}),
        Runtime(open_store(home), device, ALONE),
        model,
        Tokenizer.load(Path(task["tokenizer"])),
        MuonAdamW(parameter_groups(model, config, batch_lr_scale=task["lr_scale"]), muon_dtype=muon_dtype(device)),
        open_batches=lambda _state: ArrayBatches(batches).prefetched(),
        evaluations=[
            Evaluation(lambda: {"val_bpb": bits_per_byte(model, validation, token_bytes)}, settings.eval_every)
        ],
    )
    trainer.run()
    history = trainer.state.history
    return {
        "seconds": np.diff([0.0, *(point["train_seconds"] for point in history)]).tolist(),
        "losses": [point["loss"] for point in history],
        "evaluations": [(point["step"], point["val_bpb"]) for point in history if "val_bpb" in point],
    }


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as home:
        Path(task["result"]).write_text(json.dumps(train(task, home)))


if __name__ == "__main__":
    main()
