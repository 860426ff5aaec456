"""Answer requests with the continuous batching of Hugging Face's transformers.

``bench_engine_transformers.py`` starts this program.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig

# A request without a result after this time counts as lost.
_PATIENCE_SECONDS = 300.0


def build(task: dict[str, Any]) -> LlamaForCausalLM:
    """Create a Llama with random weights whose matrices have the same shapes as ours, except in the MLP.

    Llama's MLP has three matrices and ours has two. With an inner width of 8/3 of the model's width, both MLPs have
    equally many weights.
    """
    torch.manual_seed(task["seed"])
    config = LlamaConfig(
        hidden_size=task["dim"],
        num_hidden_layers=task["depth"],
        num_attention_heads=task["dim"] // task["head_dim"],
        num_key_value_heads=task["dim"] // task["head_dim"],
        intermediate_size=round(8 * task["dim"] / 3),
        vocab_size=task["vocab_size"],
        max_position_embeddings=task["context_length"],
        attn_implementation="sdpa",  # transformers uses flash-attn instead if it is installed
    )
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[task["dtype"]]
    return LlamaForCausalLM(config).eval().to(task["device"], dtype)


def answer(manager: Any, requests: list[dict[str, Any]]) -> list[list[list[int]]]:
    """Add all requests together. Return the generated token ids of each request, which has only one choice."""
    ids = [manager.add_request(request["prompt"], max_new_tokens=request["output"]) for request in requests]
    tokens: dict[str, list[int]] = {}
    while len(tokens) < len(ids):
        output = manager.get_result(timeout=_PATIENCE_SECONDS)
        if output is None or output.error:
            raise SystemExit(f"a request got no answer: {output and output.error}")
        if output.is_finished():
            tokens[output.request_id] = list(output.generated_tokens)
    return [[tokens[request_id]] for request_id in ids]


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(task["threads"])
    model = build(task)
    # On a CPU transformers cannot determine its limits itself. These limits exceed the needs of every case.
    limits = {"num_blocks": 4096, "page_size": 32, "max_batch_tokens": 512} if task["device"] == "cpu" else {}
    # No two prompts share a prefix, so sharing cache blocks would not help.
    batching = ContinuousBatchingConfig(allow_block_sharing=False, **limits)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    result = {}
    with model.continuous_batching_context_manager(
        generation_config=greedy, continuous_batching_config=batching
    ) as manager:
        for name, case in task["cases"].items():
            for batch in (case["warm_up"], *case["batches"][:1]):
                answer(manager, batch)
            started = time.perf_counter()
            tokens = [choices for batch in case["batches"] for choices in answer(manager, batch)]
            result[name] = {"seconds": time.perf_counter() - started, "tokens": tokens}
    Path(task["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
