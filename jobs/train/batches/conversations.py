"""Conversations as documents for the packer: their tokens, or only their lengths."""

from collections.abc import Sequence

import numpy as np

from jobs.train.batches.packing import Document
from jobs.train.batches.shuffle import EpochShuffle
from nanochat_core.chat import Message, render_conversation
from nanochat_core.tokenizer import Tokenizer


class ConversationSource:
    """Conversations in a new order each epoch. Only the assistant's tokens are counted as targets."""

    def __init__(self, conversations: Sequence[Sequence[Message]], tokenizer: Tokenizer, seed: int) -> None:
        self._conversations, self._tokenizer = conversations, tokenizer
        self._shuffle = EpochShuffle(len(conversations), seed)

    def __len__(self) -> int:
        return len(self._conversations)

    def document(self, number: int) -> Document:
        ids, mask = render_conversation(self._tokenizer, self._conversations[self._shuffle(number)])
        return Document(number, np.asarray(ids, dtype=np.int32), np.asarray(mask, dtype=bool))


class LengthSource:
    """Placeholder documents with the order and the lengths of :class:`ConversationSource`.

    Packing them counts the batches of an epoch without tokenizing the conversations again.
    """

    def __init__(self, lengths: np.ndarray, seed: int) -> None:
        """
        Args:
            lengths: tokens of each conversation, (conversations,) int64.
            seed: seed of the :class:`ConversationSource`.
        """
        self._lengths = lengths
        self._shuffle = EpochShuffle(len(lengths), seed)
        self._ids = np.zeros(lengths.max(), dtype=np.int32)
        self._counted = np.zeros(lengths.max(), dtype=bool)

    def __len__(self) -> int:
        return len(self._lengths)

    def document(self, number: int) -> Document:
        length = self._lengths[self._shuffle(number)]
        return Document(number, self._ids[:length], self._counted[:length])
