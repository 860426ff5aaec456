"""Answer requests with this project's inference engine. The engine comparisons start this program."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from jobs.eval.bench.models import random_model, random_tokenizer
from jobs.train.upstream.checkpoint import convert, model_config, read_upstream
from nanochat_core.config import ModelConfig
from nanochat_core.device import DTYPES, prepare_cpu
from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from nanochat_core.model import GPT


def load(task: dict[str, Any]) -> GPT:
    """Return our network.

    If the task names a folder with weights of the peer, the network has these weights; otherwise it has random weights.
    """
    dtype, device = DTYPES[task["dtype"]], torch.device(task["device"])
    if "depth" in task:
        shape = {name: task[name] for name in ("vocab_size", "head_dim", "context_length")}
        return random_model(ModelConfig.from_depth(task["depth"], **shape), dtype, task["seed"]).to(device)
    source = read_upstream(Path(task["folder"]), 1)
    config = model_config(source)
    model = GPT(config, dtype)
    model.load_state_dict(convert(source, config).state_dict())
    return model.to(device)


def answer(engine: Engine, requests: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Answer all requests together, and return the token ids of each request's choices.

    All requests must have the same number of choices.
    """
    samplings = [
        SamplingParams(temperature=r["temperature"], top_k=r["top_k"] or 0, max_tokens=r["output"]) for r in requests
    ]
    completions = engine.generate([r["prompt"] for r in requests], samplings, n=requests[0]["n"])
    return [[choice.token_ids for choice in choices] for choices in completions]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    prepare_cpu(task["threads"])
    model = load(task)
    most = max(sum(r["n"] for r in batch) for case in task["cases"].values() for batch in case["batches"])
    running = max(most, EngineConfig.max_running)
    engine = Engine(model, random_tokenizer(model.config.vocab_size), EngineConfig(max_running=running))
    engine.warm_up()
    result = {}
    for name, case in task["cases"].items():
        answer(engine, case["warm_up"])
        started = time.perf_counter()
        tokens = [choices for batch in case["batches"] for choices in answer(engine, batch)]
        result[name] = {"seconds": time.perf_counter() - started, "tokens": tokens}
    engine.close()
    Path(task["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
