"""What runs inside a checkout of karpathy/nanochat, for the comparisons with it; started by them, not by hand.

``python peer_process.py TASK FILE.json`` with the checkout on PYTHONPATH. The peer's own network, optimizer, compile
and evaluation are used as its ``scripts/base_train.py`` uses them; what is replaced is its data, which comes as arrays.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nanochat.checkpoint_manager import save_checkpoint
from nanochat.common import compute_init
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import RustBPETokenizer

CPU = torch.device("cpu")


def build(config: dict[str, Any]) -> GPT:
    """As base_train does: shapes first, then memory, then weights."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**config))
    model.to_empty(device=CPU)
    model.init_weights()
    return model


def logits(task: dict[str, Any]) -> None:
    """Save a random model and a tokenizer in upstream's layout, and its logits of random rows."""
    model = build(task["config"])
    generator = torch.Generator().manual_seed(task["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.dim() == 2 and "wte" not in name and "value_embeds" not in name
            parameter.copy_(1.5 * drawn / parameter.size(-1) ** 0.5 if is_matrix else drawn)
        model.resid_lambdas.add_(1.0)
        model.lm_head.weight.mul_(4.0)
    folder = Path(task["folder"])
    meta = {"step": 1, "model_config": dataclasses.asdict(model.config), "total_batch_size": 8192}
    save_checkpoint(str(folder), 1, model.state_dict(), None, meta)
    words = ["".join(random.Random(i).choices("abcdefghij", k=8)) for i in range(2000)]
    tokenizer = RustBPETokenizer.train_from_iterator(iter(words), task["config"]["vocab_size"])
    tokenizer.save(str(folder / "tokenizer"))
    ids = torch.randint(task["config"]["vocab_size"], (2, task["time"]), generator=generator)
    with torch.inference_mode():
        np.savez(folder / "logits.npz", ids=ids.numpy(), logits=model(ids).numpy())


def train(task: dict[str, Any]) -> None:
    """Optimizer steps as in base_train's loop; writes seconds, losses and evaluations of each."""
    torch.set_num_threads(task["threads"])
    compute_init("cpu")
    torch.manual_seed(task["seed"])
    original = build(task["config"])
    if task["initial"]:
        save_checkpoint(task["initial"], 0, original.state_dict(), None, {"model_config": task["config"]})
    model = torch.compile(original, dynamic=False)
    optimizer = model.setup_optimizer(**task["rates"])
    batches = torch.from_numpy(np.load(task["batches"]).astype(np.int64))
    validation = torch.from_numpy(np.load(task["validation"]).astype(np.int64))
    token_bytes = torch.tensor(task["token_bytes"], dtype=torch.int32)
    seconds: list[float] = []
    losses: list[float] = []
    evaluations: list[tuple[int, float]] = []
    for step in range(task["steps"]):
        started = time.perf_counter()
        rows = batches[step % len(batches)]
        loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * task["schedule"]["lr"][step]
            if group["kind"] == "muon":
                group["momentum"] = task["schedule"]["momentum"][step]
                group["weight_decay"] = task["rates"]["weight_decay"] * task["schedule"]["weight_decay"][step]
        optimizer.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
        if step == 0:
            gc.collect()
            gc.freeze()
            gc.disable()
        done = step + 1
        if task["evaluate_every"] and done % task["evaluate_every"] == 0:
            rows_at_once = ((v[:, :-1].contiguous(), v[:, 1:].contiguous()) for v in validation.split(32))
            bpb = evaluate_bpb(original, rows_at_once, -(-len(validation) // 32), token_bytes)
            evaluations.append((done, bpb))
        if sum(seconds[task["warmup"] :]) >= task["seconds"]:
            break
    Path(task["result"]).write_text(json.dumps({"seconds": seconds, "losses": losses, "evaluations": evaluations}))


if __name__ == "__main__":
    {"logits": logits, "train": train}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
