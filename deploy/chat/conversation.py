"""A conversation in the terminal: its messages, and the file in which a person can save them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from deploy.chat.client import Piece
from nanochat_core.errors import UserError


@dataclasses.dataclass
class Conversation:
    """The system message and the messages after it, in the form of OpenAI's API."""

    system: str = ""
    turns: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of a request: the system message, if there is one, and then the questions and answers."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, text: str) -> None:
        """Adds a message of the user."""
        self.turns.append({"role": "user", "content": text})

    def answered(self, pieces: list[Piece]) -> None:
        """Adds the answer with its Python calls, so that the model sees these calls in later requests."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        events = [piece.tool_event for piece in pieces if piece.tool_event is not None]
        if events:
            message["nanochat"] = {"tool_events": events}
        self.turns.append(message)

    def take_back(self) -> str:
        """Removes the last question and its answer, and returns the question, or an empty text if there is none."""
        while self.turns:
            message = self.turns.pop()
            if message["role"] == "user":
                return str(message["content"])
        return ""

    def save(self, path: Path) -> None:
        """Writes the conversation: as JSON if the name ends in .json, otherwise as Markdown.

        Raises UserError if the file cannot be written.
        """
        if path.suffix == ".json":
            text = json.dumps({"messages": self.messages}, ensure_ascii=False, indent=2) + "\n"
        else:
            text = "\n".join(f"**{message['role']}**\n\n{message['content']}\n" for message in self.messages)
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
