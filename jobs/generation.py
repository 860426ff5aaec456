"""Generates text with an engine in this process, decodes answers, and runs the Python code that a model calls."""

import contextlib
import re
from collections.abc import Sequence
from typing import TypeVar

from jobs.tasks.task import Response
from nanochat_core.chat import AssistantStream, Part, tool_output_text
from nanochat_core.engine import Completion, Engine, EngineConfig, SamplingParams, ToolCall, ToolOutput, ToolResult
from nanochat_core.model import GPT
from nanochat_core.sandbox import Limits, ResultFormat, SandboxExecutor
from nanochat_core.tokenizer import Tokenizer

T = TypeVar("T")

SAMPLING = SamplingParams(temperature=0.8, top_k=50, max_tokens=120, seed=7)


class SandboxTool:
    """A :class:`~nanochat_core.engine.ToolRunner` that runs an engine's tool calls in a sandbox of this process.

    The sandbox service runs code in the same way, so the output of a call has the same text there.
    """

    def __init__(self, executor: SandboxExecutor) -> None:
        self._executor = executor

    async def __call__(self, code: str, *, request_id: str, timeout_seconds: float) -> ToolOutput:  # noqa: ARG002
        result = await self._executor.execute(code, Limits(wall_seconds=timeout_seconds), ResultFormat.STR)
        return ToolOutput(result.status.value, tool_output_text(result.result, result.stdout, result.error))


def completion_parts(tokenizer: Tokenizer, completion: Completion) -> list[Part]:
    """Text, code and output in a completion, in order. A text may be cut into several parts."""
    stream = AssistantStream(tokenizer)
    return [part for token in completion.token_ids for part in stream.push(token)] + stream.finish()


def read_completion(tokenizer: Tokenizer, completion: Completion) -> Response:
    """The text of a completion, and the code and output of each finished tool call."""
    parts = completion_parts(tokenizer, completion)
    codes = [event.code for event in completion.tool_events if isinstance(event, ToolCall)]
    outputs = [event.output for event in completion.tool_events if isinstance(event, ToolResult)]
    # If the answer ended before its last tool call returned, this call has no output and is left out.
    calls = tuple(zip(codes, outputs, strict=False))
    return Response("".join(part.text for part in parts if part.type == "text"), calls)


def continue_text(
    model: GPT, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingParams = SAMPLING
) -> list[list[str]]:
    """For each prompt, a pair of the prompt and the model's continuation.

    A prompt is cut if it is longer than half of the context. A continuation ends where the model ends the document,
    after ``sampling.max_tokens`` tokens, or at the end of the context.
    """
    most = max(1, model.config.context_length // 2)
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)][:most] for prompt in prompts]
    # The engine runs no more sequences than there are prompts, because training may need the memory.
    config = EngineConfig(max_running=min(len(ids), EngineConfig.max_running))
    with contextlib.closing(Engine(model, tokenizer, config)) as engine:
        completions = engine.generate(ids, sampling)
    samples = []
    for prompt, (completion,) in zip(ids, completions, strict=True):
        tokens = completion.token_ids
        end = tokens.index(tokenizer.bos_id) if tokenizer.bos_id in tokens else len(tokens)
        samples.append([tokenizer.decode(prompt[1:]), tokenizer.decode(tokens[:end])])
    return samples


def openings(documents: Sequence[str], count: int, words: int = 6) -> list[str]:
    """The first ``words`` words of at most ``count`` evenly spread documents.

    The spaces and line breaks between the words are kept.
    """
    return ["".join(re.findall(r"\s*\S+", document)[:words]).lstrip() for document in spread(documents, count)]


def spread(members: Sequence[T], count: int) -> list[T]:
    """At most ``count`` members that are spread evenly over ``members``."""
    shown = min(count, len(members))
    return [members[i * len(members) // shown] for i in range(shown)]
