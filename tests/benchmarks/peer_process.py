"""Run tasks with the code of karpathy/nanochat (the peer). The comparisons start this program.

The command is ``python peer_process.py TASK FILE.json``, with the peer's checkout on PYTHONPATH. The task ``train``
uses the peer's own network, optimizer, compilation and evaluation in the same way as its ``scripts/base_train.py``.
Only the data differs: it comes from arrays instead of the peer's loader. The task ``base_train`` runs that script.
"""

import contextlib
import dataclasses
import gc
import io
import json
import random
import re
import runpy
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nanochat import common
from nanochat.checkpoint_manager import load_checkpoint, save_checkpoint
from nanochat.common import compute_init
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import evaluate_bpb
from nanochat.tokenizer import RustBPETokenizer

CPU = torch.device("cpu")


def build(config: dict[str, Any], device: torch.device = CPU) -> GPT:
    """Create a model on the meta device, allocate its memory and initialize its weights, as base_train does."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**config))
    model.to_empty(device=device)
    model.init_weights()
    return model


def save_random(task: dict[str, Any], generator: torch.Generator) -> GPT:
    """Create a model in which every weight affects the logits, and save it in the peer's layout."""
    model = build(task["config"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_matrix = parameter.dim() == 2 and "wte" not in name and "value_embeds" not in name
            parameter.copy_(1.5 * drawn / parameter.size(-1) ** 0.5 if is_matrix else drawn)
        model.resid_lambdas.add_(1.0)
        model.lm_head.weight.mul_(4.0)
    meta = {"step": 1, "model_config": dataclasses.asdict(model.config), "total_batch_size": 8192}
    save_checkpoint(task["folder"], 1, model.state_dict(), None, meta)
    return model


def weights(task: dict[str, Any]) -> None:
    """Save a random model in the peer's layout."""
    save_random(task, torch.Generator().manual_seed(task["seed"]))


def logits(task: dict[str, Any]) -> None:
    """Save a random model, a tokenizer, random token ids, and the model's logits for these ids."""
    generator = torch.Generator().manual_seed(task["seed"])
    model = save_random(task, generator)
    folder = Path(task["folder"])
    words = ["".join(random.Random(i).choices("abcdefghij", k=8)) for i in range(2000)]
    tokenizer = RustBPETokenizer.train_from_iterator(iter(words), task["config"]["vocab_size"])
    tokenizer.save(str(folder / "tokenizer"))
    ids = torch.randint(task["config"]["vocab_size"], (2, task["time"]), generator=generator)
    with torch.inference_mode():
        np.savez(folder / "logits.npz", ids=ids.numpy(), logits=model(ids).numpy())


def train(task: dict[str, Any]) -> None:
    """Train as in base_train's loop. Write the seconds and the loss of each step, and the evaluations."""
    torch.set_num_threads(task["threads"])
    device = torch.device(task["device"])
    compute_init(device.type)
    torch.manual_seed(task["seed"])
    original = build(task["config"], device)
    if task["initial"]:
        save_checkpoint(task["initial"], 0, original.state_dict(), None, {"model_config": task["config"]})
    model = torch.compile(original, dynamic=False)
    optimizer = model.setup_optimizer(**task["rates"])
    batches = torch.from_numpy(np.load(task["batches"]).astype(np.int64))
    validation = torch.from_numpy(np.load(task["validation"]).astype(np.int64)).to(device)
    token_bytes = torch.tensor(task["token_bytes"], dtype=torch.int32, device=device)
    seconds: list[float] = []
    losses: list[float] = []
    evaluations: list[tuple[int, float]] = []
    for step in range(task["steps"]):
        started = time.perf_counter()
        rows = batches[step % len(batches)].to(device)
        loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())  # type: ignore[no-untyped-call]
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


def base_train(task: dict[str, Any]) -> None:
    """Run scripts/base_train.py itself with the task's arguments and seed, and write the seconds of each step."""
    torch.set_num_threads(task["threads"])
    # base_train imports wandb, but does not use it in a run without a name.
    sys.modules.setdefault("wandb", types.ModuleType("wandb"))

    def seeded(device_type: str) -> Any:
        initialized = compute_init(device_type)
        torch.manual_seed(task["seed"])
        return initialized

    common.compute_init = seeded
    sys.argv = ["base_train", *task["arguments"]]
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            runpy.run_module("scripts.base_train", run_name="__main__")
    finally:
        print(log.getvalue())
    milliseconds = re.findall(r"^step .* dt: ([\d.]+)ms", log.getvalue(), re.MULTILINE)
    Path(task["result"]).write_text(json.dumps([float(number) / 1000 for number in milliseconds]))


def core_weights(task: dict[str, Any]) -> None:
    """Save a tokenizer, and a model trained for a few steps on the same text, in the peer's layout.

    The training matters: an untrained model would predict no continuation correctly, and there would be little to
    compare.
    """
    torch.set_num_threads(task["threads"])
    torch.manual_seed(task["seed"])
    texts = json.loads(Path(task["texts"]).read_text())
    folder = Path(task["folder"])
    tokenizer = RustBPETokenizer.train_from_iterator(iter(texts), task["config"]["vocab_size"])
    tokenizer.save(str(folder / "tokenizer"))
    model = build(task["config"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    order, rows, time_ = random.Random(task["seed"]), 8, 256
    for step in range(task["steps"]):
        stream: list[int] = []
        while len(stream) < rows * (time_ + 1):
            stream += tokenizer.encode(order.choice(texts), prepend=tokenizer.get_bos_token_id())
        ids = torch.tensor(stream[: rows * (time_ + 1)]).view(rows, time_ + 1)
        loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.3f}", flush=True)
    meta = {"step": 1, "model_config": dataclasses.asdict(model.config), "total_batch_size": 8192}
    save_checkpoint(task["folder"], 1, model.state_dict(), None, meta)


def core(task: dict[str, Any]) -> None:
    """Evaluate CORE with base_eval. Write the seconds and the accuracy of each task.

    base_eval looks for the bundle in NANOCHAT_BASE_DIR.
    """
    from scripts import base_eval

    torch.set_num_threads(task["threads"])
    compute_init("cpu")
    saved, _, _ = load_checkpoint(task["folder"], 1, CPU)
    model = build(task["config"])
    model.load_state_dict({name: tensor.float() for name, tensor in saved.items()}, strict=True, assign=True)
    tokenizer = RustBPETokenizer.from_directory(str(Path(task["folder"], "tokenizer")))
    seconds: list[float] = []
    evaluate_task = base_eval.evaluate_task

    def timed(*arguments: Any) -> float:
        began = time.perf_counter()
        accuracy: float = evaluate_task(*arguments)
        seconds.append(time.perf_counter() - began)
        return accuracy

    base_eval.evaluate_task = timed
    began = time.perf_counter()
    found = base_eval.evaluate_core(model.eval(), tokenizer, CPU, max_per_task=task["max_per_task"])
    whole = time.perf_counter() - began
    result = {
        "core": found["core_metric"],
        "seconds": whole,
        "tasks": {
            label: {"accuracy": accuracy, "seconds": each}
            for (label, accuracy), each in zip(found["results"].items(), seconds, strict=True)
        },
    }
    Path(task["result"]).write_text(json.dumps(result))


class NoTokens:
    """Replaces the tokenizer. The model never generates its special tokens, so every answer has the full length."""

    def encode_special(self, _name: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


class AnyOf:
    """A value that is equal to every one of the given token ids."""

    def __init__(self, ids: list[int]) -> None:
        self._ids = frozenset(ids)

    def __eq__(self, other: object) -> bool:
        return other in self._ids

    __hash__ = None  # type: ignore[assignment]


class StopTokens(NoTokens):
    """Replaces the tokenizer. Several ordinary tokens end an answer, so answers differ in length."""

    def __init__(self, ids: list[int]) -> None:
        self._stop = AnyOf(ids)

    def encode_special(self, name: str) -> Any:
        return self._stop if name == "<|assistant_end|>" else -1


def load(task: dict[str, Any]) -> GPT:
    """Load the model as the peer's build_model does, but without a tokenizer.

    On a CPU the weights are fp32, even if the peer computes in bf16.
    """
    device = torch.device(task.get("device", "cpu"))
    saved, _, _ = load_checkpoint(task["folder"], 1, device)
    model = build(task["config"], device)
    if device == CPU:
        saved = {name: tensor.float() for name, tensor in saved.items()}
    model.load_state_dict(saved, strict=True, assign=True)
    return model.eval()


def rollouts(task: dict[str, Any]) -> None:
    """Sample answers as chat_rl does. Write the duration in seconds and the lengths of the answers.

    The prompts are answered one after another. Each batch has ``device_batch`` samples of one prompt.
    """
    torch.set_num_threads(task["threads"])
    compute_init("cpu")
    engine = Engine(load(task), StopTokens(task["stop"]))
    at_once = task["device_batch"]

    def answer(prompt: list[int], number: int) -> list[int]:
        lengths = []
        for part in range(task["samples"] // at_once):
            sequences, _masks = engine.generate_batch(
                prompt,
                num_samples=at_once,
                max_tokens=task["max_new_tokens"],
                temperature=task["temperature"],
                top_k=task["top_k"],
                seed=hash((number, part)) & 0x7FFFFFFF,
            )
            lengths += [len(sequence) - len(prompt) for sequence in sequences]
        return lengths

    answer(task["warm_up"], 0)
    started = time.perf_counter()
    lengths = [answer(prompt, number) for number, prompt in enumerate(task["prompts"])]
    Path(task["result"]).write_text(json.dumps({"seconds": time.perf_counter() - started, "lengths": lengths}))


def serve(task: dict[str, Any]) -> None:
    """Answer requests one after another, as chat_cli does, and write the seconds and tokens of each case."""
    torch.set_num_threads(task["threads"])
    compute_init(task["device"])
    engine = Engine(load(task), NoTokens())

    def answer(request: dict[str, Any]) -> list[list[int]]:
        sampling = {"temperature": request["temperature"], "top_k": request["top_k"]}
        columns = [
            column
            for column, _masks in engine.generate(
                request["prompt"], num_samples=request["n"], max_tokens=request["output"], **sampling
            )
        ]
        return [list(row) for row in zip(*columns, strict=True)]

    result = {}
    for name, case in task["cases"].items():
        for request in case["warm_up"]:
            answer(request)
        started = time.perf_counter()
        tokens = [answer(request) for batch in case["batches"] for request in batch]
        result[name] = {"seconds": time.perf_counter() - started, "tokens": tokens}
    Path(task["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    task = json.loads(Path(sys.argv[2]).read_text())
    {
        "logits": logits,
        "train": train,
        "base_train": base_train,
        "weights": weights,
        "serve": serve,
        "rollouts": rollouts,
        "core_weights": core_weights,
        "core": core,
    }[sys.argv[1]](task)
