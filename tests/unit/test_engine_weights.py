"""An engine with replaced weights answers like a new engine, and keeps nothing of the old weights."""

import dataclasses

import pytest
import torch

from nanochat_core.config import ModelConfig
from nanochat_core.engine import Completion, Engine, EngineConfig, Request, SamplingParams
from nanochat_core.model import GPT
from tests.support.engine_models import BYTES, tiny_model

PROMPTS = [list(range(start, start + 70)) for start in (0, 50, 100)]
CONFIG = EngineConfig(kv_cache_bytes=1 << 22)


def changed(model: GPT) -> GPT:
    """Change every weight of the model in place."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.2)
    return model


def answers(engine: Engine) -> list[Completion]:
    choices = engine.generate(PROMPTS, SamplingParams(max_tokens=12, logprobs=0))
    return [completion for (completion,) in choices]


def test_after_an_update_it_answers_as_a_new_engine() -> None:
    model = tiny_model()
    engine = Engine(model, BYTES, CONFIG)
    before = answers(engine)
    engine.update_weights(changed(model))
    fresh = answers(Engine(model, BYTES, CONFIG))
    assert [c.tokens for c in answers(engine)] == [c.tokens for c in fresh]
    assert [c.token_ids for c in before] != [c.token_ids for c in fresh], "the weights make a difference"
    engine.check_integrity()


def test_prefixes_of_the_old_weights_are_not_found_again() -> None:
    model = tiny_model()
    engine = Engine(model, BYTES, CONFIG)

    def cached() -> list[int]:
        return [completion.usage.cached_prompt_tokens for completion in answers(engine)]  # type: ignore[union-attr]

    cached()
    assert min(cached()) > 0, "the second time they are in the cache"
    engine.update_weights(model)
    assert cached() == [0, 0, 0]


def test_what_becomes_of_the_model_later_changes_no_answer() -> None:
    model = tiny_model()
    engine = Engine(model, BYTES, CONFIG)
    engine.update_weights(model)
    before = [completion.tokens for completion in answers(engine)]
    changed(model)
    engine.blocks.forget()
    assert [completion.tokens for completion in answers(engine)] == before


def test_weights_do_not_change_under_a_request() -> None:
    model = tiny_model()
    engine = Engine(model, BYTES, CONFIG)
    engine.add(Request("r", tuple(PROMPTS[0])))
    with pytest.raises(RuntimeError, match="1 requests are in flight"):
        engine.update_weights(model)
    engine.cancel("r")
    engine.update_weights(model)


def test_another_model_is_refused() -> None:
    engine = Engine(tiny_model(), BYTES, CONFIG)
    config: ModelConfig = dataclasses.replace(tiny_model().config, context_length=128)
    with pytest.raises(ValueError, match="another configuration"):
        engine.update_weights(GPT(config))
