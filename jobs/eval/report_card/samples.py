"""Text that a model continues."""

from __future__ import annotations

from collections.abc import Sequence

from nanochat_core.checkpoint import Checkpoint
from nanochat_core.engine import Engine, SamplingParams

SAMPLING = SamplingParams(temperature=0.8, top_k=50, max_tokens=120, seed=7)


def continue_text(
    checkpoint: Checkpoint, prompts: Sequence[str], sampling: SamplingParams = SAMPLING
) -> list[tuple[str, str]]:
    """Each prompt with the model's continuation, which ends where the model ends its document."""
    tokenizer = checkpoint.tokenizer
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    engine = Engine(checkpoint.build_model(), tokenizer)
    try:
        completions = engine.generate(ids, sampling)
    finally:
        engine.close()
    samples = []
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        tokens = completion.token_ids
        end = tokens.index(tokenizer.bos_id) if tokenizer.bos_id in tokens else len(tokens)
        samples.append((prompt, tokenizer.decode(tokens[:end])))
    return samples


def openings(documents: Sequence[str], count: int, words: int = 6) -> list[str]:
    """The first words of ``count`` documents spread over ``documents``, as prompts."""
    stride = max(1, len(documents) // count)
    return [" ".join(document.split()[:words]) for document in documents[::stride][:count]]
