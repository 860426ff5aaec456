"""What the gateway knows of the model behind an engine."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import ASSISTANT_END, Tokenizer


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One revision of a model with its tokenizer.

    Attributes:
        context_length: tokens, prompt and answer together.
        created: when this gateway first saw the revision, in seconds since the epoch.
        parameters: number of weights.
        tokenizer_digest: sha256 of the tokenizer's file, empty when the engine does not tell.
    """

    name: str
    revision: str
    context_length: int
    parameters: int
    compute_dtype: str
    created: int
    fingerprint: str
    tokenizer: Tokenizer
    tokenizer_digest: str = ""

    @classmethod
    def from_info(cls, info: engine_pb2.ModelInfo, tokenizer: Tokenizer, created: int) -> ServedModel:
        """What an engine said about its model, with the tokenizer that came with it."""
        identity = repr((info.name, info.revision, sorted(info.digests.items())))
        return cls(
            name=info.name,
            revision=info.revision,
            context_length=info.context_length,
            parameters=info.parameters,
            compute_dtype=info.compute_dtype,
            created=created,
            fingerprint="fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12],
            tokenizer=tokenizer,
            tokenizer_digest=info.digests.get("tokenizer.json", ""),
        )

    @functools.cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The end of the assistant's message, and the beginning of another document."""
        return (self.tokenizer.special_ids[ASSISTANT_END], self.tokenizer.bos_id)

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """Most bytes that one token can stand for."""
        return max(map(len, self.tokenizer.token_bytes))
