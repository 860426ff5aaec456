"""A revision of a model as the gateway uses it: its description and its tokenizer."""

import dataclasses
import functools
import hashlib
import time

from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import Tokenizer

_WEIGHTS, _TOKENIZER = "model.safetensors", "tokenizer.json"  # keys of ModelInfo.digests

# The cache returns the same object for equal JSON, so replicas of one model share a tokenizer.
_load_tokenizer = functools.lru_cache(maxsize=4)(Tokenizer.from_json)


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One revision of a model, as an engine serves it.

    ``created`` is the time, in seconds since the epoch, when this gateway read the engine's description of the model.
    """

    info: engine_pb2.ModelInfo
    tokenizer: Tokenizer
    created: int = 0

    @classmethod
    def load(cls, info: engine_pb2.ModelInfo) -> "ServedModel":
        """Builds the object from an engine's description of its model. A large tokenizer makes this slow.

        Raises UserError if the tokenizer's JSON is damaged.
        """
        return cls(info, _load_tokenizer(info.tokenizer_json), int(time.time()))

    @functools.cached_property
    def identity(self) -> str:
        """Name and revision: ``model/stage/step_n``."""
        return f"{self.info.name}/{self.info.revision}"

    @property
    def weights(self) -> str:
        """Digest of the weights; empty if the engine does not report it."""
        return self.info.digests.get(_WEIGHTS, "")

    @property
    def tokenizer_digest(self) -> str:
        """Digest of the tokenizer; empty if the engine does not report it."""
        return self.info.digests.get(_TOKENIZER, "")

    @property
    def context_length(self) -> int:
        """Largest number of tokens of a prompt and its answer together."""
        return self.info.context_length

    @functools.cached_property
    def fingerprint(self) -> str:
        """Text that identifies name, revision and files of the model: OpenAI's field ``system_fingerprint``."""
        identity = repr((self.info.name, self.info.revision, sorted(self.info.digests.items())))
        return "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """Number of bytes of the longest token."""
        return max(map(len, self.tokenizer.token_bytes))
