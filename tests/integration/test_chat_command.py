"""``nanochat chat`` in a pseudo-terminal and in a pipe, with a scripted engine behind the real gateway."""

import asyncio
import json
import os
import pty
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.scripted_engine import (
    TOKENIZER,
    ScriptedEngine,
    running_engine,
    running_gateway,
    saying,
    until_ready,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[ScriptedEngine, str]]:
    async with running_engine() as engine, running_gateway(engine.address) as url:
        await until_ready(url)
        yield engine, url


# Makes stdin the controlling terminal, and runs the command of its arguments there.
_ON_TERMINAL = "import os, sys; os.login_tty(0); os.execvp(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A process on a pseudo-terminal. ``shown`` is everything that it has written."""

    def __init__(self, environment: dict[str, str], *command: str) -> None:
        self.shown = ""
        self._environment, self._command = environment, command

    async def __aenter__(self) -> "Terminal":
        self._master, slave = pty.openpty()
        # Ctrl-C is a signal only on the controlling terminal. A function between fork and exec could set it too, but
        # children of processes with threads were seen to crash in such functions.
        command = sys.executable, "-c", _ON_TERMINAL, *self._command
        self.process = await asyncio.create_subprocess_exec(*command, env=self._environment, cwd=ROOT, stdin=slave)
        os.close(slave)
        asyncio.get_running_loop().add_reader(self._master, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._master)
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        os.close(self._master)

    def _read(self) -> None:
        try:
            self.shown += os.read(self._master, 65536).decode(errors="replace")
        except OSError:  # the process has closed the terminal
            asyncio.get_running_loop().remove_reader(self._master)

    async def until(self, text: str, after: int = 0) -> int:
        """Waits until ``text`` is in ``shown`` at or after the index ``after``. Returns the index of the text's end."""
        async with asyncio.timeout(60):
            while (found := self.shown.find(text, after)) < 0:
                await asyncio.sleep(0.02)
        return found + len(text)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}


async def test_a_conversation_on_a_terminal(served: tuple[ScriptedEngine, str], tmp_path: Path) -> None:
    engine, url = served
    engine.script = saying("**hello** world")
    command = (sys.executable, "-m", "deploy.chat", "--address", url, "--system", "Be kind.")
    async with Terminal(environment(tmp_path), *command) as terminal:
        place = await terminal.until("> ")
        terminal.type("hi\n")
        place = await terminal.until("world", place)
        place = await terminal.until("> ", place)
        terminal.type("\x1b[A there\n")  # the arrow key brings the question back
        place = await terminal.until("world", place)
        place = await terminal.until("> ", place)
        terminal.type(f"/save {tmp_path / 'chat.json'}\n")
        place = await terminal.until("saved", place)
        terminal.type("/nonsense[/dim]\n")
        place = await terminal.until("there is no command /nonsense[/dim];", place)
        await terminal.until("> ", place)
        terminal.type("\x04")
        assert await asyncio.wait_for(terminal.process.wait(), 60) == 0
        assert "**" not in terminal.shown
    messages = json.loads((tmp_path / "chat.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "hi there"
    assert "hi\n" in (tmp_path / "nanochat" / "chat_history").read_text()


async def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on(
    served: tuple[ScriptedEngine, str], tmp_path: Path
) -> None:
    engine, url = served
    engine.script = saying("a long answer", until=asyncio.Event())
    async with Terminal(environment(tmp_path), sys.executable, "-m", "deploy.chat", "--address", url) as terminal:
        place = await terminal.until("> ")
        terminal.type("hi\n")
        place = await terminal.until("a l", place)
        terminal.type("\x03")
        place = await terminal.until("stopped", place)
        await terminal.until("> ", place)
        await asyncio.wait_for(engine.cancelled.acquire(), 60)


async def test_a_question_in_a_pipe(served: tuple[ScriptedEngine, str], tmp_path: Path) -> None:
    engine, url = served
    engine.script = saying("**hello** world")
    command = (sys.executable, "-m", "deploy.chat", "--address", url, "-p", "What is this?")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(tmp_path), cwd=ROOT
    )
    out, errors = await process.communicate(b"some notes\n")
    assert (out.decode(), errors.decode(), process.returncode) == ("**hello** world\n", "", 0)
    prompt = TOKENIZER.decode(engine.requests[-1].prompt_token_ids)
    assert "What is this?\n\nsome notes<|user_end|>" in prompt
