"""Bits per byte on held-out text, a measure of language models that does not depend on the tokenizer."""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from nanochat_core.device import precise_dtype
from nanochat_core.model import GPT, IGNORE_INDEX
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE, Ranks


@torch.inference_mode()
def bits_per_byte(
    model: GPT,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    *,
    rows: int = 16,
    max_tokens: int | None = None,
    ranks: Ranks = ALONE,
) -> float:
    """The negative log2 likelihood of the documents, divided by their number of UTF-8 bytes.

    A loss per token depends on the length of the tokenizer's tokens. A loss per byte does not. Each document begins
    with BOS and is cut into rows of the context length. The model predicts each token once, from the tokens before it
    in its row. Special tokens represent no bytes, so their loss is not counted.

    Args:
        rows: number of rows per forward pass.
        max_tokens: stop after about this number of tokens; None uses all documents.
        ranks: the ranks that share the work; each of them gets the result.
    """
    device = model.smear_scale.device
    bytes_per_token = torch.tensor(tokenizer.bytes_per_token, device=device)
    precise = precise_dtype(device)
    sums = torch.zeros(2, dtype=precise, device=device)  # nats and bytes
    tokens = 0
    for number, (ids, targets) in enumerate(_batches(_rows(tokenizer, documents, model.config.context_length), rows)):
        if max_tokens is not None and tokens >= max_tokens:
            break
        tokens += int((targets != IGNORE_INDEX).sum())
        if number % ranks.size != ranks.rank:
            continue
        ids, targets = ids.to(device), targets.to(device)
        losses = model.loss(ids, targets, "none").view_as(targets).to(precise)
        lengths = torch.where(targets == IGNORE_INDEX, 0, bytes_per_token[targets.clamp(min=0)])
        sums += torch.stack([(losses * (lengths > 0)).sum(), lengths.sum().to(precise)])
    nats, total_bytes = map(float, ranks.sum(sums).tolist())
    return nats / math.log(2) / max(total_bytes, 1.0)


def _rows(tokenizer: Tokenizer, documents: Iterable[str], length: int) -> Iterator[list[int]]:
    """Tokens of each row and the token that follows the row's last position: at most ``length + 1`` tokens."""
    for document in documents:
        ids = [tokenizer.bos_id, *tokenizer.encode(document)]
        for start in range(0, len(ids) - 1, length):
            yield ids[start : start + length + 1]


def _batches(rows: Iterator[list[int]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of ``size`` rows, each (size, length) int64. Rows are padded to the batch's longest row."""
    while batch := list(itertools.islice(rows, size)):
        length = max(map(len, batch)) - 1
        ids, targets = torch.zeros(2, len(batch), length, dtype=torch.int64)
        targets.fill_(IGNORE_INDEX)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens) - 1] = torch.tensor(tokens[:-1])
            targets[row, : len(tokens) - 1] = torch.tensor(tokens[1:])
        yield ids, targets
