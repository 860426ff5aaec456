"""The HTTP client: sends a conversation and reads the answer while the server writes it."""

import dataclasses
import json
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import httpx

from deploy.chat.settings import ChatSettings
from nanochat_core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer: text, an event of the model's Python tool, or the reason why the answer ended."""

    text: str = ""
    tool_event: dict[str, Any] | None = None
    finish_reason: str | None = None


class ChatClient:
    """A connection to a server that offers the OpenAI API."""

    def __init__(self, settings: ChatSettings) -> None:
        self._settings = settings
        headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
        timeout = httpx.Timeout(settings.timeout_seconds, connect=10.0)
        address = settings.address.rstrip("/").removesuffix("/v1")
        self._http = httpx.Client(base_url=address, headers=headers, timeout=timeout)

    def close(self) -> None:
        """Closes the connection."""
        self._http.close()

    def model(self) -> str:
        """The name of the model that will answer: the model of the settings, or the first model that the server lists.

        Raises UserError if the server does not answer, answers with an error or in another form than the OpenAI API's,
        or has no model.
        """
        if self._settings.model:
            return self._settings.model
        try:
            answer = self._http.get("/v1/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        _check(answer)
        try:
            names = [str(model["id"]) for model in answer.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise _no_api(answer.text) from error
        if not names:
            raise UserError(f"{self._http.base_url} serves no model yet; try again once its engine is ready")
        return names[0]

    def answer(self, messages: Sequence[dict[str, Any]], model: str) -> Generator[Piece, None, None]:
        """Yields the pieces of the assistant's next message. Closing the generator stops the answer.

        Raises UserError if the server cannot be reached, answers with an error, or ends the answer too early.
        """
        wanted = {name: getattr(self._settings, name) for name in ("temperature", "top_k", "max_tokens", "seed")}
        body = {"model": model, "messages": list(messages), "stream": True}
        body |= {name: value for name, value in wanted.items() if value is not None}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != httpx.codes.OK:
                    response.read()
                    _check(response)
                yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> UserError:
        if isinstance(error, httpx.ConnectError):
            return UserError(
                f"nothing answers at {self._http.base_url}; start a server (make run), or name one with --address"
            )
        return UserError(f"the connection to {self._http.base_url} broke: {type(error).__name__} {error}")


def _pieces(lines: Iterator[str]) -> Iterator[Piece]:
    """Reads the lines of server-sent events. Raises UserError for an error event or if the last event is not [DONE]."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if data == line.strip():  # a comment, or the empty line between events
            continue
        if data == "[DONE]":
            return
        try:
            pieces = list(_pieces_of(json.loads(data)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _no_api(data) from error
        yield from pieces
    raise UserError("the answer broke off: the server closed the connection")


def _pieces_of(event: Any) -> Iterator[Piece]:
    if "error" in event:
        raise UserError(f"the answer broke off: {event['error']['message']}")
    for choice in event.get("choices", ()):
        delta = choice.get("delta") or {}
        if delta.get("content"):
            yield Piece(str(delta["content"]))
        for tool_event in (delta.get("nanochat") or {}).get("tool_events", ()):
            yield Piece(tool_event=dict(tool_event))
        if choice.get("finish_reason"):
            yield Piece(finish_reason=str(choice["finish_reason"]))


def _no_api(reply: str) -> UserError:
    return UserError(f"the server's reply does not have the form of the OpenAI API: {reply[:200]}; is --address right?")


def _check(response: httpx.Response) -> None:
    if response.status_code == httpx.codes.OK:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    hint = "; give a key with --api-key or NANOCHAT_CHAT_API_KEY" if response.status_code in (401, 403) else ""
    raise UserError(f"the server answered {response.status_code}: {message}{hint}")
