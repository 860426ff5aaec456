"""Lets a model answer the same questions at several steps of its training, so that people see what it has learned."""

import contextlib
import logging
from collections.abc import Sequence

from jobs.generation import SandboxTool, continue_text, read_completion
from nanochat_core.chat import Message, parse_messages, render_prompt, stop_token_ids
from nanochat_core.engine import Engine, EngineConfig, SamplingParams, ToolPolicy
from nanochat_core.model import GPT
from nanochat_core.sandbox import SandboxExecutor, SandboxUnavailable
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger("jobs.train")

_CHAT_TOKENS, _TEXT_TOKENS = 96, 32


def answer_questions(
    model: GPT, tokenizer: Tokenizer, questions: Sequence[str], *, chat: bool
) -> list[tuple[str, str]]:
    """Pairs of a question and the greedy answer; empty if the model cannot answer, for example for lack of memory.

    The answers are only for people who watch the training, so an error is logged, and the training goes on.

    With ``chat``, each question is a user's message, and the model has its Python tool if the sandbox works on this
    machine. The answer to a question that does not fit into the context is empty. Without ``chat``, the model continues
    each question as text.
    """
    try:
        if chat:
            return _chat_answers(model, tokenizer, questions)
        sampling = SamplingParams(max_tokens=_TEXT_TOKENS, seed=0)
        return [(prompt, text.strip()) for prompt, text in continue_text(model, tokenizer, questions, sampling)]
    except Exception:
        log.exception("the questions are not answered")
        return []


def _chat_answers(model: GPT, tokenizer: Tokenizer, questions: Sequence[str]) -> list[tuple[str, str]]:
    sampling = SamplingParams(max_tokens=_CHAT_TOKENS, stop_token_ids=stop_token_ids(tokenizer), seed=0)
    prompts = {question: tuple(render_prompt(tokenizer, _asked(question))) for question in questions}
    fitting = {question: ids for question, ids in prompts.items() if len(ids) < model.config.context_length}
    with contextlib.ExitStack() as stack:
        tool = None
        try:
            tool = SandboxTool(stack.enter_context(contextlib.closing(SandboxExecutor().start())))
        except SandboxUnavailable as error:
            log.warning("the questions are answered without Python", extra={"reason": str(error)})
        config = EngineConfig(max_running=max(1, len(fitting)))
        engine = stack.enter_context(contextlib.closing(Engine(model, tokenizer, config, tool_runner=tool)))
        completions = engine.generate(list(fitting.values()), sampling, tools=ToolPolicy(enabled=tool is not None))
    texts = [read_completion(tokenizer, completion).text.strip() for (completion,) in completions]
    answers = dict(zip(fitting, texts, strict=True))
    return [(question, answers.get(question, "")) for question in questions]


def _asked(question: str) -> list[Message]:
    return parse_messages([{"role": "user", "content": question}])
