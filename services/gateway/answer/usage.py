"""Token counts of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from services.gateway.answer.choices import Answers


def usage(answers: Sequence[Answers]) -> dict[str, Any]:
    """The ``usage`` object over all prompts of a request. A prompt counts once, however many choices it has."""
    prompt = sum(each.prompt_tokens for each in answers)
    completion = sum(each.completion_tokens for each in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(each.cached_prompt_tokens for each in answers)},
    }
