"""The settings of the chat in the terminal."""

import dataclasses

from nanochat_core.settings import setting


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """Chat in the terminal with a running gateway, or with another server that has OpenAI's API."""

    prompt: str | None = setting(
        None, "ask this one question and end, also -p; text on standard input is added to it", positional=True
    )
    address: str = setting("http://127.0.0.1:8000", "base address of the server, without /v1")
    api_key: str = setting("", "key of the server", secret=True)
    model: str = setting("", "name of the model; optional while the server has one")
    system: str = setting("", "system message of the conversation")
    temperature: float | None = setting(
        None, "sampling temperature, also -t; 0 is greedy, the server's default otherwise", minimum=0, maximum=2
    )
    top_k: int | None = setting(None, "number of most likely tokens to sample from, also -k", minimum=0)
    max_tokens: int | None = setting(None, "most tokens of an answer", minimum=1)
    seed: int | None = setting(None, "seed of the sampling, for the same answers again", minimum=0, maximum=2**63 - 1)
    timeout_seconds: float = setting(600.0, "longest silence of the server", minimum=1)
