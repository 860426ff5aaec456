"""Held-out demo conversations, answered by the model and checked: ``python -m jobs.eval.chat --model demo``."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from jobs.eval.tools import SandboxTool
from jobs.train.demo_world import EvalItem, check, evaluation_set
from jobs.train.recipes import RECIPES
from nanochat_core import logs
from nanochat_core import tokenizer as tok
from nanochat_core.chat import AssistantStream, parse_messages, render_prompt
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, load_checkpoint, newest_checkpoint
from nanochat_core.device import prepare_cpu
from nanochat_core.engine import Completion, Engine, SamplingParams, ToolCall, ToolPolicy, ToolResult
from nanochat_core.errors import UserError, run_main
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME, Store, open_store
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger("jobs.eval.chat")

MAX_ANSWER_TOKENS = 120


@dataclasses.dataclass(frozen=True)
class ChatEvalSettings:
    """Measure how many held-out demo conversations a model answers correctly."""

    model: str = setting(help="name of the model in the store")
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    revision: str = setting("", "<stage>/step_<n>; the newest SFT checkpoint when not given")
    items: int = setting(200, "conversations", minimum=7)
    seed: int = setting(0, "which conversations are drawn", minimum=0)
    recipe: str = setting("demo", "recipe whose kinds of conversations are asked")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "least severe level that is logged")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said to one item, and whether it was right."""

    item: EvalItem
    text: str
    tool_calls: tuple[tuple[str, str], ...]  # code and output of each
    correct: bool


@dataclasses.dataclass(frozen=True)
class ChatResult:
    """All answers of one evaluation."""

    revision: str
    answers: tuple[Answer, ...]

    def accuracy(self, kinds: Sequence[str] | None = None) -> float:
        """Share of right answers among the items of ``kinds`` (all when None)."""
        chosen = [answer.correct for answer in self.answers if kinds is None or answer.item.kind in kinds]
        return sum(chosen) / len(chosen)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Right answers and items of each kind."""
        asked = Counter(answer.item.kind for answer in self.answers)
        right = Counter(answer.item.kind for answer in self.answers if answer.correct)
        return {kind: (right[kind], asked[kind]) for kind in sorted(asked)}

    def summary(self) -> dict[str, Any]:
        """For ``report.json``."""
        return {
            "revision": self.revision,
            "accuracy": self.accuracy(),
            "kinds": {kind: {"right": right, "items": items} for kind, (right, items) in self.by_kind().items()},
        }


def evaluate(checkpoint: Checkpoint, items: Sequence[EvalItem]) -> ChatResult:
    """Answer every item greedily, all in one continuous batch, with Python calls in the sandbox."""
    tokenizer = checkpoint.tokenizer
    prompts = [render_prompt(tokenizer, parse_messages(item.messages)) for item in items]
    stop = frozenset({tokenizer.special_ids[tok.ASSISTANT_END], tokenizer.bos_id})
    sampling = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, stop_token_ids=stop)
    with SandboxExecutor() as executor:
        engine = Engine(checkpoint.build_model(), tokenizer, tool_runner=SandboxTool(executor))
        try:
            completions = engine.generate(prompts, sampling, tools=ToolPolicy(enabled=True))
        finally:
            engine.close()
    answers = [_answer(item, completion, tokenizer) for item, (completion,) in zip(items, completions, strict=True)]
    return ChatResult(checkpoint.ref.revision, tuple(answers))


def items_for(recipe: str, count: int, seed: int = 0) -> list[EvalItem]:
    """Held-out items of the kinds that a recipe teaches.

    Raises:
        UserError: there is no such recipe.
    """
    if recipe not in RECIPES:
        raise UserError(f"there is no recipe {recipe!r}; choose one of {', '.join(RECIPES)}")
    kinds = RECIPES[recipe].conversation_kinds
    return [item for item in evaluation_set(count, seed) if kinds is None or item.kind in kinds]


def pick_checkpoint(store: Store, model: str, revision: str, stage: str = "sft") -> Checkpoint:
    """The named checkpoint, or the newest of the stage.

    Raises:
        UserError: there is none.
    """
    if revision:
        return load_checkpoint(store, CheckpointRef.parse(model, revision))
    checkpoint = newest_checkpoint(store, model, stage)
    if checkpoint is None:
        raise UserError(f"model {model!r} has no {stage} checkpoint in {store}; train it first")
    return checkpoint


def _answer(item: EvalItem, completion: Completion, tokenizer: Tokenizer) -> Answer:
    stream = AssistantStream(tokenizer)
    parts = [part for token in completion.token_ids for part in stream.push(token)] + stream.finish()

    def joined(kind: str) -> str:
        return "".join(part.text for part in parts if part.type == kind)

    codes = [event.code for event in completion.tool_events if isinstance(event, ToolCall)]
    outputs = [event.output for event in completion.tool_events if isinstance(event, ToolResult)]
    calls = tuple(zip(codes, outputs, strict=False))  # the last call has no output when the answer ended first
    text = joined("text").strip()
    return Answer(item, text, calls, check(item, text, bool(calls)))


def run(settings: ChatEvalSettings, show: Callable[[str], None]) -> ChatResult:
    """Evaluate and show a table of accuracies and the wrong answers."""
    prepare_cpu(settings.threads)
    checkpoint = pick_checkpoint(open_store(settings.home), settings.model, settings.revision)
    result = evaluate(checkpoint, items_for(settings.recipe, settings.items, settings.seed))
    show(f"{settings.model} {result.revision}: {result.accuracy():.1%} of {len(result.answers)} conversations right")
    for kind, (right, asked) in result.by_kind().items():
        show(f"  {kind:<12} {right:>4} of {asked:<4} {right / asked:.1%}")
    for answer in result.answers:
        if not answer.correct:
            question = answer.item.messages[-1]["content"]
            called = "; ".join(f"{code} -> {output}" for code, output in answer.tool_calls)
            show(json.dumps({"kind": answer.item.kind, "asked": question, "said": answer.text, "called": called}))
    return result


def main() -> None:
    settings = load(ChatEvalSettings, prefix="NANOCHAT_CHAT_EVAL", program="python -m jobs.eval.chat")
    logs.configure("chat-eval", settings.log_level)
    run(settings, lambda line: print(line, file=sys.stdout))


if __name__ == "__main__":
    run_main(main, "python -m jobs.eval.chat")
