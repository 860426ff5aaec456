"""The model that an engine serves."""

from __future__ import annotations

import dataclasses
import functools
import hashlib

from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One revision of a model with its tokenizer.

    Attributes:
        context_length: largest number of tokens of prompt and answer together.
        parameters: number of weights.
        created: time when this gateway first saw the revision, in seconds since the epoch.
        fingerprint: identifies name, revision and files; OpenAI's ``system_fingerprint``.
        tokenizer_digest: SHA-256 of the tokenizer's file, empty if the engine does not report it.
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
        """Makes the model from an engine's report and the tokenizer that came with it."""
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
    def longest_token_bytes(self) -> int:
        """The largest number of bytes of a token."""
        return max(map(len, self.tokenizer.token_bytes))
