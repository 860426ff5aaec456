"""``python -m deploy.chat``: a conversation in the terminal, or one question with ``-p``."""

import contextlib
import os
import readline
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from deploy.chat.client import ChatClient, Piece
from deploy.chat.conversation import Conversation
from deploy.chat.screen import AnswerView
from deploy.chat.settings import ChatSettings
from nanochat_core import settings
from nanochat_core.errors import UserError, run_main

_PROGRAM = "python -m deploy.chat"
_SHORT = {"-p": "--prompt", "-t": "--temperature", "-k": "--top-k"}
_HISTORY_LINES = 1000
_HELP = """/system TEXT  set the system message and begin a new conversation; without TEXT, show it
/clear        begin a new conversation with the same system message
/retry        ask the last question again
/undo         remove the last question and its answer
/save FILE    write the conversation as Markdown, or as JSON if FILE ends in .json
/help         show this list
/exit         end, as Ctrl-D does

A line that ends with a backslash continues on the next line. Ctrl-C stops an answer."""


class Chat:
    """A conversation on a terminal."""

    def __init__(self, client: ChatClient, config: ChatSettings) -> None:
        """Raises the errors of :meth:`ChatClient.model`."""
        self._client = client
        self._model = client.model()
        self._console, self._errors = Console(), Console(stderr=True, highlight=False)
        self._conversation = Conversation(config.system)

    def ask(self, question: str) -> None:
        """Asks a question and shows the answer. If Ctrl-C stops the answer, the conversation keeps the answer so far.

        If the server cannot be reached, refuses the question or breaks the answer off, removes the question and raises
        UserError.
        """
        self._conversation.ask(question)
        pieces: list[Piece] = []
        try:
            with (
                contextlib.closing(self._client.answer(self._conversation.messages, self._model)) as answer,
                AnswerView(self._console, self._errors) as view,
            ):
                for piece in answer:
                    pieces.append(piece)
                    if piece.text:
                        view.text(piece.text)
                    if piece.tool_event is not None:
                        view.tool_event(piece.tool_event)
        except KeyboardInterrupt:
            self._errors.print("[dim]stopped[/dim]")
        except UserError:
            self._conversation.take_back()
            raise
        if pieces and pieces[-1].finish_reason == "length":
            self._errors.print("[dim]the answer reached the limit of its length[/dim]")
        self._conversation.answered(pieces)

    def talk(self) -> None:
        """Reads questions and commands until the end of the input."""
        self._errors.print(f"[dim]{escape(self._model)}: /help lists the commands, Ctrl-D ends[/dim]")
        while True:
            try:
                line = _read_line()
            except EOFError:
                self._errors.print()
                return
            except KeyboardInterrupt:
                self._errors.print()
                continue
            if line in ("/exit", "/quit"):
                return
            try:
                self._obey(line)
            except UserError as error:
                self._errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False)

    def _obey(self, line: str) -> None:
        command, _, argument = line.partition(" ")
        commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/clear": self._clear,
            "/retry": self._retry,
            "/undo": self._undo,
            "/save": self._save,
            "/help": lambda _: self._errors.print(_HELP, highlight=False, markup=False),
        }
        if command in commands:
            commands[command](argument.strip())
        elif line.startswith("/"):
            raise UserError(f"there is no command {command}; /help lists the commands")
        elif line.strip():
            self.ask(line)

    def _set_system(self, text: str) -> None:
        if text:
            self._conversation = Conversation(text)
        else:
            self._errors.print(self._conversation.system or "no system message", highlight=False, markup=False)

    def _clear(self, _: str) -> None:
        self._conversation = Conversation(self._conversation.system)

    def _retry(self, _: str) -> None:
        turns = list(self._conversation.turns)
        question = self._conversation.take_back()
        if not question:
            raise UserError("there is no question yet")
        try:
            self.ask(question)
        except UserError:
            self._conversation.turns = turns  # the old answer is kept, because there is no new one
            raise

    def _undo(self, _: str) -> None:
        if not self._conversation.take_back():
            raise UserError("there is no question yet")

    def _save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs the name of a file")
        self._conversation.save(Path(name).expanduser())
        self._errors.print(f"[dim]saved {escape(name)}[/dim]", highlight=False)


def main() -> None:
    """Holds a conversation if there is no ``-p`` and standard input is a terminal. Otherwise, answers one question."""
    arguments = [_SHORT.get(argument, argument) for argument in sys.argv[1:]]
    config = settings.load(ChatSettings, prefix="NANOCHAT_CHAT", program=_PROGRAM, argv=arguments)
    if config.prompt is None and sys.stdin.isatty():
        with contextlib.closing(ChatClient(config)) as client, _history():
            Chat(client, config).talk()
        return
    given = "" if sys.stdin.isatty() else sys.stdin.read().strip()
    question = "\n\n".join(text for text in (config.prompt, given) if text)
    if not question:
        raise UserError("there is no question: give one with -p, or on standard input")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the program without a traceback
    with contextlib.closing(ChatClient(config)) as client:
        Chat(client, config).ask(question)


def _read_line() -> str:
    lines = [input("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(". "))
    return "\n".join(lines)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Loads the input lines of earlier conversations, so that the arrow keys recall them.

    At the end, saves the newest :data:`_HISTORY_LINES` lines. The lines are in the file ``nanochat/chat_history`` of
    the user's state folder (``XDG_STATE_HOME``).
    """
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "nanochat"
    path = folder / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(_HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)


if __name__ == "__main__":
    run_main(main, _PROGRAM)
