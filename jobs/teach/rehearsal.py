"""Conversations that a model writes itself, to be repeated during its lessons.

The problem: a lesson must mix its questions with conversations of fine-tuning, so that the model does not forget other
things. The store has no such conversations for an imported model. The idea is *pseudorehearsal* (Robins 1995,
"Catastrophic forgetting, rehearsal and pseudorehearsal"): the model itself answers questions before its first lesson,
and these answers are repeated. They contain only what the model knows already, so they teach nothing new, and keep the
model's behavior as it is. For language models, the method is described by Huang et al. 2024 (arXiv 2403.01244).

The questions are about many subjects (:mod:`general_questions`), and about the assistant and its calculator, as in the
recipes for a user's own text. A model that was fine-tuned like ours cannot write its own questions, because the tokens
of users' messages were no targets of its training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
from collections.abc import Iterator, Sequence

from jobs.demo_world.conversations import CONVERSATION_MIX, conversations
from jobs.generation import SandboxTool
from jobs.recipes import WORLDLESS_KINDS
from jobs.tasks.conversations import write_conversations
from jobs.teach.general_questions import general_questions
from nanochat_core.chat import AssistantStream, Message, Part, render_conversation, render_prompt, stop_token_ids
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.engine import Completion, Engine, Request, SamplingParams, ToolPolicy
from nanochat_core.errors import UserError
from nanochat_core.lessons.items import to_json
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger("jobs.teach")

# Number of questions about the assistant and its calculator.
_ABOUT_ITSELF = 300
_MAX_TOKENS = 200
# One conversation in this many is held out for the examination.
_HELD_OUT_ONE_IN = 6
# With fewer answers, a lesson would repeat the same few conversations all the time.
_FEWEST = 100


def rehearse(store: Store, checkpoint: Checkpoint) -> str:
    """Let a model answer questions, and store the conversations as ``data/<name>/``. Returns the name.

    If the store has the conversations of a model with these weights already, they stay as they are.

    Raises UserError if the model ends too few of its answers.
    """
    name = f"rehearsal-{checkpoint.weights_digest[:16]}"
    if store.exists(f"data/{name}/val.jsonl"):
        return name
    written = list(_answered(checkpoint, _questions()))
    if len(written) < _FEWEST:
        raise UserError(
            f"the store has no conversations on which {checkpoint.ref.prefix} was fine-tuned, and the model itself "
            f"ended only {len(written)} of its answers to {len(_questions())} questions within {_MAX_TOKENS} "
            "tokens; name conversations with --replay, so that the model does not forget everything else"
        )
    rows = [{"messages": [to_json(message) for message in conversation]} for conversation in written]
    held_out = rows[::_HELD_OUT_ONE_IN]
    write_conversations(store, name, "train", [row for i, row in enumerate(rows) if i % _HELD_OUT_ONE_IN])
    write_conversations(store, name, "val", held_out)  # written last, because it says that both files are complete
    log.info("the model has written what it must not forget", extra={"conversations": len(rows), "mixture": name})
    return name


def _questions() -> list[str]:
    """Different questions in random order. The order is always the same."""
    rng = random.Random("rehearsal")  # noqa: S311
    mix = {kind: share for kind, share in CONVERSATION_MIX.items() if kind in WORLDLESS_KINDS}
    drawn = conversations("train", 3, _ABOUT_ITSELF, mix)
    about_itself = [next(each["content"] for each in one["messages"] if each["role"] == "user") for one in drawn]
    found = list(dict.fromkeys([*general_questions(rng), *about_itself]))
    return rng.sample(found, len(found))


def _answered(checkpoint: Checkpoint, questions: Sequence[str]) -> Iterator[tuple[Message, Message]]:
    """The questions with the model's greedy answers, in the order of the questions.

    A conversation is left out if it does not have exactly the tokens that the model has read and written, for example
    because the answer does not end.
    """
    tokenizer, context = checkpoint.tokenizer, checkpoint.config.context_length
    asked = [Message("user", (Part("text", question),)) for question in questions]
    sampling = SamplingParams(seed=0, max_tokens=_MAX_TOKENS, stop_token_ids=stop_token_ids(tokenizer))
    requests = [
        Request(str(i), prompt, sampling, tools=ToolPolicy(enabled=True))
        for i, message in enumerate(asked)
        if len(prompt := tuple(render_prompt(tokenizer, [message]))) < context
    ]
    with (
        SandboxExecutor() as sandbox,
        contextlib.closing(Engine(checkpoint.build_model(), tokenizer, tool_runner=SandboxTool(sandbox))) as engine,
    ):
        given = {int(request_id): completion for request_id, (completion,) in engine.complete(requests)}
    for request in requests:
        i = int(request.id)
        conversation = (asked[i], _message(tokenizer, given[i]))
        if render_conversation(tokenizer, conversation)[0] == [*request.prompt, *given[i].token_ids]:
            yield conversation


def _message(tokenizer: Tokenizer, completion: Completion) -> Message:
    """A completion as a message. Neighboring texts of one kind are one part."""
    stream = AssistantStream(tokenizer)
    parts: list[Part] = []
    for part in [*(each for token in completion.token_ids for each in stream.push(token)), *stream.finish()]:
        if parts and parts[-1].type == part.type:
            parts[-1] = dataclasses.replace(part, text=parts[-1].text + part.text)
        else:
            parts.append(part)
    return Message("assistant", tuple(parts))
