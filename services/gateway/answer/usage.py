"""Token counts of a request."""

from collections.abc import Sequence
from typing import Any

from services.gateway.answer.choices import Choices


def usage(prompts: Sequence[Choices]) -> dict[str, Any]:
    """Builds the ``usage`` object of a request. Each prompt counts once, however many choices it has."""
    prompt = sum(choices.prompt_tokens for choices in prompts)
    completion = sum(choices.completion_tokens for choices in prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(choices.cached_prompt_tokens for choices in prompts)},
    }
