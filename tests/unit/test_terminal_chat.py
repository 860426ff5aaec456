"""The chat in the terminal: Markdown in blocks, the stream's events, and the conversation."""

import io
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from deploy.chat.__main__ import Chat
from deploy.chat.client import ChatClient, Piece
from deploy.chat.conversation import Conversation
from deploy.chat.screen import AnswerView, split_blocks
from deploy.chat.settings import ChatSettings
from nanochat_core.errors import UserError

CALL = {"type": "call", "call_index": 0, "code": "6*7", "offset": 0}
RESULT = {"type": "result", "call_index": 0, "status": "ok", "output": "42"}


def client(status: int, text: str, seen: list[Any] | None = None, **config: Any) -> ChatClient:
    """A client of a server that always gives this answer; ``seen`` gets the requests."""

    def answer(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(request)
        return httpx.Response(status, text=text)

    made = ChatClient(ChatSettings(**config))
    made._http = httpx.Client(
        base_url="http://server", headers=made._http.headers, transport=httpx.MockTransport(answer)
    )
    return made


def event(delta: Any, finish_reason: str | None = None) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish_reason}]})}\n\n"


STREAM = (
    ": keep-alive\n\n"
    + event({"role": "assistant", "content": ""})
    + event({"content": "It is "})
    + event({"nanochat": {"tool_events": [CALL, RESULT]}})
    + event({"content": "42."})
    + event({}, "stop")
)


@pytest.mark.parametrize(
    ("text", "complete", "rest"),
    [
        ("a", "", "a"),
        ("a\n\nb", "a\n\n", "b"),
        ("a\n\nb\n\n", "a\n\nb\n\n", ""),
        ("```\na\n\nb", "", "```\na\n\nb"),
        ("x\n\n```\na\n\nb", "x\n\n", "```\na\n\nb"),
        ("```\na\n\nb\n```\n\nc", "```\na\n\nb\n```\n\n", "c"),
    ],
)
def test_markdown_is_complete_up_to_the_last_blank_line_outside_of_code(text: str, complete: str, rest: str) -> None:
    assert split_blocks(text) == (complete, rest)


def test_an_answer_is_read_piece_by_piece() -> None:
    seen: list[Any] = []
    source = client(200, STREAM + "data: [DONE]\n\n", seen, temperature=0.0, api_key="secret")
    pieces = list(source.answer([{"role": "user", "content": "hi"}], "demo"))
    assert pieces == [
        Piece("It is "),
        Piece(tool_event=CALL),
        Piece(tool_event=RESULT),
        Piece("42."),
        Piece(finish_reason="stop"),
    ]
    assert json.loads(seen[0].content) == {
        "model": "demo",
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "temperature": 0.0,
    }
    assert seen[0].headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (200, STREAM, "the server closed the connection"),
        (200, 'data: {"error": {"message": "engine lost"}}\n\n', "engine lost"),
        (400, '{"error": {"message": "too long"}}', "400: too long"),
        (401, '{"error": {"message": "no key"}}', "--api-key"),
        (502, "<html>Bad gateway</html>", "Bad gateway"),
    ],
)
def test_a_failure_is_said_in_words(status: int, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(client(status, text).answer([], "demo"))


FOREIGN = ["not JSON", "[]", "null", '"text"', '{"error": "text"}', '{"choices": [7]}', '{"choices": [{"delta": "x"}]}']


@pytest.mark.parametrize("reply", [*FOREIGN, '{"choices": [{"delta": {"nanochat": {"tool_events": [7]}}}]}'])
def test_an_event_of_another_form_is_an_error_in_words(reply: str) -> None:
    with pytest.raises(UserError, match="does not have the form of the OpenAI API"):
        list(client(200, f"data: {reply}\n\n").answer([], "demo"))


@pytest.mark.parametrize("reply", ["<html>", "[]", "null", "{}", '{"data": 7}', '{"data": [7]}', '{"data": [{}]}'])
def test_a_list_of_models_of_another_form_is_an_error_in_words(reply: str) -> None:
    with pytest.raises(UserError, match="does not have the form of the OpenAI API"):
        client(200, reply).model()


def test_the_model_is_the_servers_first_one_unless_one_is_named() -> None:
    listed = '{"data": [{"id": "demo"}, {"id": "other"}]}'
    assert client(200, listed).model() == "demo"
    assert client(200, listed, model="other").model() == "other"
    with pytest.raises(UserError, match="serves no model yet"):
        client(200, '{"data": []}').model()


def test_a_conversation_keeps_python_calls_and_takes_questions_back() -> None:
    conversation = Conversation("Be kind.")
    conversation.ask("hi")
    conversation.answered([Piece("It is "), Piece(tool_event=CALL), Piece("42.")])
    assert conversation.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "It is 42.", "nanochat": {"tool_events": [CALL]}},
    ]
    assert conversation.take_back() == "hi"
    assert conversation.turns == []
    assert conversation.take_back() == ""


def test_a_conversation_is_saved_in_the_form_that_the_name_says(tmp_path: Path) -> None:
    conversation = Conversation()
    conversation.ask("é")
    conversation.save(tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text()) == {"messages": [{"role": "user", "content": "é"}]}
    conversation.save(tmp_path / "chat.md")
    assert (tmp_path / "chat.md").read_text() == "**user**\n\né\n"
    with pytest.raises(UserError, match="cannot write"):
        conversation.save(tmp_path / "missing" / "chat.md")


def show(*, terminal: bool) -> tuple[str, str]:
    """What an answer with a Python call leaves on standard output and on standard error."""
    out, errors = io.StringIO(), io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=60, color_system=None)
    with AnswerView(console, Console(file=errors, width=60)) as view:
        view.text("# Sum\n\nIt is ")
        view.tool_event(CALL)
        view.tool_event(RESULT)
        view.text("**42**.")
    return out.getvalue(), errors.getvalue()


def test_a_pipe_gets_the_text_alone() -> None:
    out, errors = show(terminal=False)
    assert out == "# Sum\n\nIt is **42**.\n"
    assert "6*7" in errors


def test_a_terminal_shows_markdown_and_the_python_call() -> None:
    out, errors = show(terminal=True)
    assert "6*7" in out
    assert "Sum" in out
    assert "**" not in out
    assert errors == ""


def test_retry_keeps_the_old_answer_if_the_server_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ChatClient, "model", lambda _: "demo")
    chat = Chat(client(503, json.dumps({"error": {"message": "no engine"}})), ChatSettings())
    chat._conversation.ask("What is 6 * 7?")
    chat._conversation.answered([Piece("It is 42.")])
    turns = list(chat._conversation.turns)
    with pytest.raises(UserError, match="no engine"):
        chat._obey("/retry")
    assert chat._conversation.turns == turns
