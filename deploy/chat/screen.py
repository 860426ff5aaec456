"""Shows an answer while it is written: as Markdown on a terminal, as plain text otherwise."""

import re
import types
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text

_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
_REFRESHES_PER_SECOND = 12


def split_blocks(text: str) -> tuple[str, str]:
    """Splits Markdown into its complete blocks and the block that may still grow.

    Blocks are separated by blank lines, except within fenced code.
    """
    end = len(text)
    while (end := text.rfind("\n\n", 0, end)) >= 0:
        if len(_FENCE.findall(text[:end])) % 2 == 0:
            return text[: end + 2], text[end + 2 :]
    return "", text


class AnswerView:
    """Shows one answer. Complete blocks are printed once; only the last block is drawn again while it grows.

    Use it as a context manager.
    """

    def __init__(self, console: Console, errors: Console) -> None:
        """If ``console`` is not a terminal, only text is printed to it, and Python calls are printed to ``errors``."""
        self._console, self._errors = console, errors
        self._tail = ""
        self._live = (
            Live(console=console, refresh_per_second=_REFRESHES_PER_SECOND, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._flush()
        if self._live is not None:
            self._live.stop()
        else:
            self._console.out("")

    def text(self, piece: str) -> None:
        """Adds text to the answer on the screen."""
        if self._live is None:
            self._console.out(piece, end="", highlight=False)
            return
        complete, self._tail = split_blocks(self._tail + piece)
        if complete.strip():
            self._print(Markdown(complete))
        self._live.update(Markdown(self._tail))

    def tool_event(self, event: dict[str, Any]) -> None:
        """Shows a Python call of the model, or its result."""
        self._flush()
        if event.get("type") == "call":
            code = Syntax(str(event.get("code", "")), "python", background_color="default")
            self._print(Panel(code, title="Python", title_align="left", border_style="blue"))
        else:
            failed = event.get("status") != "ok"
            title = f"failed: {event.get('status')}" if failed else "result"
            style = "red" if failed else "green"
            self._print(Panel(Text(str(event.get("output", ""))), title=title, title_align="left", border_style=style))

    def _flush(self) -> None:
        """Prints the last block, which is now complete and is not drawn again."""
        tail, self._tail = self._tail, ""
        if self._live is not None:
            self._live.update(Text(""))
            if tail.strip():
                self._print(Markdown(tail))

    def _print(self, shown: RenderableType) -> None:
        (self._console if self._live is not None else self._errors).print(shown)
