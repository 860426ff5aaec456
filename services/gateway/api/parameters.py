"""Checks and reads request parameters that several endpoints share."""

from collections.abc import Collection

from services.gateway.engines.request import Truncation
from services.gateway.errors import invalid_value, shown
from services.gateway.schemas import ApiModel, ChatParameters, refuse_unknown
from services.gateway.settings import GatewaySettings

# Number of tokens to keep free for the answer when old messages are left out, unless the request limits the answer.
_ROOM_TOKENS = 256


def check_known(body: ApiModel, settings: GatewaySettings, known: Collection[str] = ()) -> None:
    """Raises an :class:`ApiError` with status 400 for an unknown parameter, if the settings refuse such parameters.

    ``known`` contains the names of further parameters that this endpoint knows.
    """
    if settings.unknown_parameters == "refuse":
        refuse_unknown(body, known)


def check_choices(n: int, settings: GatewaySettings) -> None:
    """Raises an :class:`ApiError` with status 400 if a request asks for more answers than the settings allow."""
    if n > settings.max_choices:
        message = f"n is {shown(str(n))}; this server writes at most {settings.max_choices} answers to a prompt."
        raise invalid_value(message, "n")


def check_prompts(prompts: int, settings: GatewaySettings) -> None:
    """Raises an :class:`ApiError` with status 400 if a request has more prompts than the settings allow."""
    if prompts > settings.max_prompts:
        message = f"The request has {prompts} prompts; this server accepts at most {settings.max_prompts}."
        raise invalid_value(message, "prompt")


def wished_truncation(body: ChatParameters) -> Truncation | None:
    """Returns the truncation that the request asks for; None if the prompt must contain all messages."""
    return Truncation(body.limit or _ROOM_TOKENS) if body.truncation == "auto" else None
