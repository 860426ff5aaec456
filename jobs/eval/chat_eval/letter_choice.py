"""Scores the letters of multiple-choice questions: a letter's score is its logit as the token after the prompt."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.tokenizer import Tokenizer


@torch.inference_mode()
def last_logits(model: GPT, prompts: Sequence[Sequence[int]], tokens: Sequence[int], max_tokens: int) -> Tensor:
    """The logits of ``tokens`` as the next token after each prompt: (prompts, tokens) fp32, on the CPU.

    Prompts of similar length share a forward pass. They are padded at the end; attention is causal, so the padding
    changes no logits. A pass has at most ``max_tokens`` tokens, padding included; a longer prompt has a pass of its
    own.
    """
    device = model.smear_scale.device
    wanted = torch.tensor(tokens, device=device)
    found = torch.empty(len(prompts), len(tokens))
    for batch in _batches(prompts, max_tokens):
        lengths = [len(prompts[i]) for i in batch]
        ids = torch.zeros(len(batch), max(lengths), dtype=torch.int64)
        for row, i in enumerate(batch):
            ids[row, : lengths[row]] = torch.tensor(prompts[i])
        hidden = model.hidden(ids.to(device))
        last = hidden[torch.arange(len(batch), device=device), torch.tensor(lengths, device=device) - 1]
        found[batch] = model.logits(last)[:, wanted].float().cpu()
    return found


def letter_tokens(tokenizer: Tokenizer, letters: str) -> list[int]:
    """The token id of each letter. Raises a :class:`UserError` if the tokenizer encodes a letter as several tokens."""
    encoded = [tokenizer.encode(letter) for letter in letters]
    if any(len(ids) != 1 for ids in encoded):
        raise UserError("the tokenizer has no tokens for single letters, so multiple-choice tasks cannot be evaluated")
    return [ids[0] for ids in encoded]


def _batches(prompts: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """The indices of the prompts of each forward pass, longest prompts first, so that a lack of memory shows early."""
    batch: list[int] = []
    for i in sorted(range(len(prompts)), key=lambda i: -len(prompts[i])):
        if batch and (len(batch) + 1) * len(prompts[batch[0]]) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
