"""A batch of many sequences is cut up more finely than one of few, which changes no bit of what comes out."""

from __future__ import annotations

import random

from engine_models import BYTES, tiny_model

from nanochat_core.engine import Engine, EngineConfig, SamplingParams, Token
from nanochat_core.engine.kv_cache import MANY_CHUNKS


def test_a_token_has_the_same_bits_in_a_batch_of_many_as_in_one_of_few() -> None:
    source = random.Random(5)
    model, count = tiny_model(context_length=512), MANY_CHUNKS + 26
    prompts = [[source.randrange(256) for _ in range(source.choice([5, 40, 100, 130, 250, 300]))] for _ in range(count)]
    sampling = [SamplingParams(temperature=1.0, top_k=50, seed=i, max_tokens=6, logprobs=0) for i in range(count)]

    def answers(first: int, last: int) -> list[list[Token]]:
        running = last - first
        config = EngineConfig(kv_cache_bytes=1 << 26, max_running=running, token_budget=8192)
        engine = Engine(model, BYTES, config)
        return [one.tokens for (one,) in engine.generate(prompts[first:last], sampling[first:last])]

    many = answers(0, count)
    few = [tokens for first in range(0, count, 10) for tokens in answers(first, min(first + 10, count))]
    assert many == few
