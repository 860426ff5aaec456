"""The settings of the chat in the terminal."""

import dataclasses

from nanochat_core.settings import setting


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """Chat in the terminal with a running gateway, or with another server that offers the OpenAI API."""

    prompt: str | None = setting(
        None,
        "ask only this question and end (short form -p); text on standard input is appended to the question",
        positional=True,
    )
    address: str = setting("http://127.0.0.1:8000", "base address of the server, without /v1")
    api_key: str = setting("", "API key of the server", secret=True)
    model: str = setting("", "name of the model; by default the first model that the server lists")
    system: str = setting("", "system message of the conversation")
    temperature: float | None = setting(
        None,
        "sampling temperature (short form -t); 0 always takes the likeliest token; by default, the server chooses",
        minimum=0,
        maximum=2,
    )
    top_k: int | None = setting(None, "number of most likely tokens to sample from (short form -k)", minimum=0)
    max_tokens: int | None = setting(None, "largest number of tokens in an answer", minimum=1)
    seed: int | None = setting(
        None, "seed of the sampling; the same seed gives the same answers again", minimum=0, maximum=2**63 - 1
    )
    timeout_seconds: float = setting(
        600.0, "seconds without data from the server after which a request fails", minimum=1
    )
