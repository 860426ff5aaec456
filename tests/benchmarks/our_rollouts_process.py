"""Sample rollouts with the engine configured as in RL. ``bench_rollouts_peer.py`` starts this program."""

import json
import sys
import time
from pathlib import Path

from jobs.eval.bench.models import random_tokenizer
from nanochat_core.device import prepare_cpu
from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from tests.benchmarks.our_engine_process import load


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    prepare_cpu(task["threads"])
    model = load(task)
    samples, prompts = task["samples"], task["prompts"]
    running = min(256, samples * len(prompts))
    engine = Engine(
        model, random_tokenizer(model.config.vocab_size), EngineConfig(max_running=running, token_budget=2 * running)
    )

    def answer(some: list[list[int]], first: int, count: int) -> list[list[int]]:
        """Generate ``count`` samples of each prompt together. Return the samples' lengths without the stop token."""
        each = [
            SamplingParams(
                temperature=task["temperature"],
                top_k=task["top_k"],
                seed=first + number,
                max_tokens=task["max_new_tokens"],
                stop_token_ids=frozenset(task["stop"]),
                logprobs=0,
            )
            for number in range(len(some))
        ]
        completions = engine.generate(some, each, n=count)
        return [[len(c.tokens) - (c.tokens[-1].id in task["stop"]) for c in choices] for choices in completions]

    answer([task["warm_up"]], 0, task["device_batch"])
    started = time.perf_counter()
    if task["one_at_a_time"]:
        parts = samples // task["device_batch"]
        lengths = [
            [
                length
                for part in range(parts)
                for length in answer([prompt], number * parts + part, task["device_batch"])[0]
            ]
            for number, prompt in enumerate(prompts)
        ]
    else:
        lengths = answer(prompts, 0, samples)
    seconds = time.perf_counter() - started
    engine.close()
    Path(task["result"]).write_text(json.dumps({"seconds": seconds, "lengths": lengths}))


if __name__ == "__main__":
    main()
