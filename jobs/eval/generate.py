"""Let a model write in the terminal: ``python -m jobs.eval.generate --model demo "Who keeps the lighthouse?"``."""

import contextlib
import dataclasses
import io
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TextIO

from jobs.generation import SandboxTool
from jobs.program import JobSettings, run_program
from nanochat_core.chat import AssistantStream, parse_messages, render_prompt, stop_token_ids
from nanochat_core.checkpoint import STAGES, check_model_name, pick_checkpoint
from nanochat_core.device import choose_device, choose_dtype, prepare_cpu
from nanochat_core.engine import Engine, EngineConfig, Output, Request, SamplingParams, ToolCall, ToolPolicy
from nanochat_core.errors import UserError
from nanochat_core.sandbox import SandboxExecutor, SandboxUnavailable
from nanochat_core.settings import setting
from nanochat_core.store import open_store
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger("jobs.eval.generate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateSettings(JobSettings):
    """Continue a prompt with a base model, or answer it with a chat model. The text appears piece by piece."""

    model: str = setting(help="name of the model in the store")
    prompt: str | None = setting(
        None,
        "text to continue or to answer, with or without --prompt before it; standard input by default",
        positional=True,
    )
    stage: Literal["auto", "base", "sft", "rl"] = setting(
        "auto", "stage whose newest checkpoint writes; auto is the last stage that the model has"
    )
    revision: str = setting("", "<stage>/step_<n>, or promoted, instead of the newest checkpoint of a stage")
    mode: Literal["auto", "text", "chat"] = setting(
        "auto", "text continues the prompt, chat answers it as a user's message; auto is text for base checkpoints only"
    )
    system: str = setting("", "system message of a chat")
    tools: bool = setting(True, "run the Python code that the model calls in a chat, in the sandbox")
    echo: bool = setting(False, "show the prompt before the text that continues it")
    samples: int = setting(1, "number of continuations or answers", minimum=1)
    max_tokens: int = setting(256, "largest number of tokens to generate; 0 fills the context", minimum=0)
    temperature: float = setting(0.8, "sampling temperature; 0 is greedy", minimum=0.0)
    top_k: int = setting(50, "number of most likely tokens to sample from; 0 samples from all tokens", minimum=0)
    top_p: float = setting(1.0, "total probability of the most likely tokens to sample from; 1 samples from all")
    min_p: float = setting(0.0, "least probability of a token, as a share of the highest probability; 0 is off")
    repetition_penalty: float = setting(1.0, "factor against tokens that occurred before, prompt included; 1 is off")
    presence_penalty: float = setting(0.0, "subtracted from the logits of tokens that the answer already contains")
    frequency_penalty: float = setting(0.0, "subtracted from a token's logit for each time that the answer contains it")
    seed: int | None = setting(
        None, "seed of the sampling; equal seeds give equal texts; random by default", minimum=0, maximum=2**64 - 1
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device to compute on")
    dtype: Literal["auto", "fp32", "bf16"] = setting("auto", "dtype to compute in; auto is fp32 on CPUs")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0, maximum=4096)
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "warning", "least severe level that is logged; info logs the seed and the speed"
    )


def run(settings: GenerateSettings, show: Callable[[str], None], show_tool: Callable[[str], None]) -> None:
    """Generate text. Pass it to ``show`` piece by piece, and Python calls and their output to ``show_tool``.

    Several samples are shown one after another, each below a line with its number. Raises UserError, for example if the
    model is missing, or if the prompt does not fit into the model's context.
    """
    prompt = read_prompt(settings.prompt, sys.stdin)
    prepare_cpu(settings.threads)
    device = choose_device(settings.device)
    store = open_store(settings.home)
    stages = STAGES if settings.stage == "auto" else (settings.stage,)
    checkpoint = pick_checkpoint(store, check_model_name(settings.model), settings.revision, *stages)
    tokenizer = checkpoint.tokenizer
    chat = settings.mode == "chat" or (settings.mode == "auto" and checkpoint.ref.stage != "base")
    if settings.system and not chat:
        raise UserError(
            "--system belongs to a chat, but the prompt is continued as text; add --mode chat, or leave --system out"
        )
    ids = chat_prompt(tokenizer, settings.system, prompt) if chat else [tokenizer.bos_id, *tokenizer.encode(prompt)]
    seed = secrets.randbits(63) if settings.seed is None else settings.seed
    request = Request(
        "generate",
        tuple(ids),
        sampling_params(settings, seed, stop_token_ids(tokenizer)),
        settings.samples,
        ToolPolicy(enabled=chat and settings.tools),
    )
    model = checkpoint.build_model(device, choose_dtype(settings.dtype, device))
    config = EngineConfig(max_running=settings.samples, token_budget=max(EngineConfig.token_budget, settings.samples))
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(open_sandbox()) if request.tools.enabled else None
        engine = stack.enter_context(contextlib.closing(Engine(model, tokenizer, config, tool_runner=runner)))
        started, tokens, line_begins = time.monotonic(), 0, True
        before = prompt if settings.echo and not chat else ""
        for piece in in_order(pieces(engine.stream([request]), tokenizer), settings.samples):
            tokens += piece.tokens
            title = f"--- {piece.index + 1} of {settings.samples} ---\n" if settings.samples > 1 else ""
            if text := (title + before if piece.first else "") + piece.text:
                show(text)
                line_begins = text.endswith("\n")
            if piece.tool:
                show_tool(piece.tool if line_begins else f"\n{piece.tool}")
                line_begins = True
    log.info(
        "generated",
        extra={
            "checkpoint": checkpoint.ref.prefix,
            "seed": seed,
            "prompt_tokens": len(ids),
            "tokens": tokens,
            "tokens_per_second": round(tokens / (time.monotonic() - started), 1),
        },
    )


@contextlib.contextmanager
def open_sandbox() -> Iterator[SandboxTool]:
    """Start the sandbox that runs the model's Python calls. Raises UserError if this machine cannot isolate code."""
    try:
        executor = SandboxExecutor().start()
    except SandboxUnavailable as error:
        raise UserError(f"{error}; --no-tools answers without Python") from error
    with contextlib.closing(executor):
        yield SandboxTool(executor)


def read_prompt(prompt: str | None, stdin: TextIO | None) -> str:
    """Return ``prompt``. If it is None, return the text of ``stdin``; a line break at the end of this text is removed.

    Raises UserError if ``stdin`` is needed and is None or not UTF-8. A terminal as ``stdin`` raises UserError too,
    because the user would not know that the program waits for input.
    """
    if prompt is not None:
        return prompt
    if stdin is None or stdin.isatty():
        raise UserError("there is no prompt; give it in quotation marks after the flags, or on standard input")
    try:
        return stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text (at byte {error.start}); convert it first") from error


def chat_prompt(tokenizer: Tokenizer, system: str, message: str) -> list[int]:
    """Token ids of a conversation with one user's message, which the assistant answers next.

    ``system`` is the message before it; empty for none. Raises UserError if ``message`` has only whitespace.
    """
    if not message.strip():
        raise UserError("the message is empty; there is nothing to answer")
    messages = [{"role": "system", "content": system}] if system else []
    return render_prompt(tokenizer, parse_messages([*messages, {"role": "user", "content": message}]))


def sampling_params(settings: GenerateSettings, seed: int, stops: frozenset[int]) -> SamplingParams:
    """The sampling parameters of the settings. If a value is out of range, raises a UserError that names the value."""
    names = {field.name for field in dataclasses.fields(SamplingParams)} - {"seed"}
    given = {name: value for name, value in dataclasses.asdict(settings).items() if name in names}
    return SamplingParams(**given, seed=seed, stop_token_ids=stops)


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of one sample, and then possibly a Python call or its result.

    Attributes:
        tokens: number of new tokens.
        first: whether this is the sample's first piece.
        last: whether this is the sample's last piece.
    """

    index: int
    text: str
    tool: str
    tokens: int
    first: bool
    last: bool


def pieces(outputs: Iterable[Output], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Decode an engine's outputs. A character is yielded when all its tokens have arrived, or when the sample ends.

    Python code and its output are not part of a piece's ``text``. They are in its ``tool``, and the code begins with
    ``>>>``.
    """
    streams: dict[int, AssistantStream] = {}
    for output in outputs:
        first = output.index not in streams
        stream = streams.setdefault(output.index, AssistantStream(tokenizer))
        parts = [part for token in output.tokens for part in stream.push(token.id)]
        if output.finish_reason:
            parts += stream.finish()
        text = "".join(part.text for part in parts if part.type == "text")
        tool = "".join(f">>> {e.code}\n" if isinstance(e, ToolCall) else f"{e.output}\n" for e in output.tool_events)
        yield Piece(output.index, text, tool, len(output.tokens), first, output.finish_reason is not None)


def in_order(found: Iterable[Piece], samples: int) -> Iterator[Piece]:
    """Yield all pieces of the first sample, then all pieces of the next sample. Each sample ends with a line break."""
    waiting: dict[int, list[Piece]] = {index: [] for index in range(samples)}
    current, ends_line = 0, False
    for piece in found:
        waiting[piece.index].append(piece)
        while current < samples and waiting[current]:
            shown = waiting[current].pop(0)
            ends_line = shown.text.endswith("\n") if shown.text else ends_line
            if shown.last:
                shown = dataclasses.replace(shown, text=shown.text if ends_line else f"{shown.text}\n")
                current, ends_line = current + 1, False
            yield shown


def main(settings: GenerateSettings) -> None:
    """Write the text to standard output.

    Python calls and their output go to standard error, so that a pipe gets only the text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal shows "?" for a character that it lacks

    def write(stream: TextIO, text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        run(settings, lambda text: write(sys.stdout, text), lambda text: write(sys.stderr, text))
    except KeyboardInterrupt:
        write(sys.stdout, "\n")
        raise
    except BrokenPipeError:
        # The reader, such as ``head``, has closed the pipe. stdout is redirected to the null device, because Python
        # would otherwise fail when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


if __name__ == "__main__":
    run_program("jobs.eval.generate", "generate", GenerateSettings, main)
