"""Conversations that a model writes itself, to be repeated during its lessons.

The problem: a lesson must mix its questions with conversations of fine-tuning, so that the model does not forget other
things. The store does not have the fine-tuning conversations of an imported model. The idea is *pseudorehearsal*
(Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"): the model itself answers questions before its
first lesson, and these answers are repeated. They contain only what the model knows already, so they teach nothing new,
and keep the model's behavior as it is. For language models, the method is described by Huang et al. 2024 (arXiv
2403.01244).

The first questions are about many subjects (:mod:`general_questions`), about the assistant, or ask the assistant to
calculate, as in the recipes for a user's own text. Further questions come from the answers: they ask about the names in
the answers, or they are questions that a sentence of an answer answers. The model cannot write the questions itself,
because fine-tuning usually trains only on the assistant's messages, not on the user's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jobs.demo_world.conversations import CONVERSATION_MIX, conversations
from jobs.generation import SandboxTool, completion_parts
from jobs.recipes import WORLDLESS_KINDS
from jobs.tasks.conversations import write_conversations
from jobs.teach.general_questions import general_questions, questions_about
from jobs.teach.wordings import statement_questions
from nanochat_core.chat import Message, Part, render_conversation, render_prompt, stop_token_ids
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, load_checkpoint, weights_digest
from nanochat_core.engine import Completion, Engine, Request, SamplingParams, ToolPolicy
from nanochat_core.errors import UserError
from nanochat_core.lessons.items import normal, to_json
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.store import Store
from nanochat_core.tokenizer import Tokenizer

log = logging.getLogger("jobs.teach")

# A word that may be a name: it begins with a capital letter, and it stands inside a sentence, or before a word such as
# "is" or before "'s".
_NAME = re.compile(r"(?<=[a-z,] )[A-Z]\w+|\b[A-Z]\w+(?=(?: is| was| has| lives| works)\b|'s\b)")
_PRONOUN = re.compile("I|You|He|She|It|We|They|There|This|That|What|Who|Here")

Conversation = tuple[Message, Message]

# Number of questions that are drawn about the assistant, or that ask it to calculate. A question that is drawn twice is
# asked once. With only 300 such questions, a small model that had computed 134 of 160 held-out answers rightly computed
# only 103 of them rightly after two lessons.
_ABOUT_ITSELF = 1500
# Number of rounds of further questions, and largest number of further questions in a round.
_ROUNDS, _FURTHER = 2, 600
_MAX_TOKENS = 200
# Half of the answers of which the model was sure (see _SURE), but at most this many, are held out for the examination.
HELD_OUT = 300
# A model is sure of an answer if each token of the answer has at least this probability. In two lessons of an imported
# model, 24 answers changed, and 22 of them had a token that was less likely than this. But another lesson also changed
# answers whose tokens had probabilities of 0.98 and more: the model then answered other questions with the lesson's
# answer, such as "What is my house called?" with the dog's name.
_SURE = 0.8
# If the model was sure of fewer answers than this, no lesson is given, because the examination would have too few
# questions.
_FEWEST_SURE = 100


def rehearse(store: Store, ref: CheckpointRef) -> str:
    """Let a checkpoint's model answer questions, and store the conversations as ``data/<name>/``. Returns the name.

    If the store has the conversations of a model with these weights already, they stay as they are.

    Raises UserError if the model ends too few of its answers, or is sure of too few of them.
    """
    name = f"rehearsal-{weights_digest(store, ref)[:16]}"
    if store.exists(f"data/{name}/val.jsonl"):
        return name
    rng = random.Random("rehearsal")  # noqa: S311
    asked = _questions(rng)
    checkpoint = load_checkpoint(store, ref)
    model, tokenizer = checkpoint.build_model(), checkpoint.tokenizer
    with (
        SandboxExecutor() as sandbox,
        contextlib.closing(Engine(model, tokenizer, tool_runner=SandboxTool(sandbox))) as engine,
    ):
        written = list(_answered(engine, checkpoint, asked))
        for _ in range(_ROUNDS):
            known = {normal(question) for question in asked}
            further = [each for each in _further_questions([one for one, _ in written]) if normal(each) not in known]
            further = rng.sample(further, min(_FURTHER, len(further)))
            asked += further
            written += _answered(engine, checkpoint, further)
    sure = [one for one, is_sure in written if is_sure]
    if len(sure) < _FEWEST_SURE:
        raise UserError(
            f"the store has no conversations on which {ref.prefix} was fine-tuned, and the model itself "
            f"answered only {len(sure)} of {len(asked)} questions with certainty; name conversations with --replay, so "
            "that the model does not forget everything else"
        )
    apart = {id(one) for one in sure[: min(HELD_OUT, len(sure) // 2)]}
    # The validation file is written last, so if it exists, both files are complete.
    for split, held_out in (("train", False), ("val", True)):
        rows = (_row(one) for one, _ in written if (id(one) in apart) is held_out)
        write_conversations(store, name, split, rows)
    log.info(
        "the model has written conversations to repeat during its lessons",
        extra={"conversations": len(written), "sure": len(sure), "mixture": name},
    )
    return name


def _questions(rng: random.Random) -> list[str]:
    """All questions of the first round, without repetitions and in random order."""
    mix = {kind: share for kind, share in CONVERSATION_MIX.items() if kind in WORLDLESS_KINDS}
    drawn = conversations("train", 3, _ABOUT_ITSELF, mix)
    about_itself = [next(each["content"] for each in one["messages"] if each["role"] == "user") for one in drawn]
    found = list(dict.fromkeys([*general_questions(rng), *about_itself]))
    return rng.sample(found, len(found))


def _further_questions(conversations: Sequence[Conversation]) -> list[str]:
    """Questions about the names in the answers, and questions that sentences of the answers answer.

    No question is repeated.
    """
    texts = list(dict.fromkeys(answer.text for _, answer in conversations))
    names = sorted({name for text in texts for name in _NAME.findall(text) if not _PRONOUN.fullmatch(name)})
    found = [question for name in names for question in questions_about(name)]
    for text in texts:
        found += [question for questions, _ in statement_questions(text) for question in questions]
        found += [f"Who is {whom}?" for whom in re.findall(r"\b[A-Z]\w+ is (the [\w ]+)", text)]
    return list(dict.fromkeys(found))


def _row(conversation: Conversation) -> dict[str, Any]:
    return {"messages": [to_json(message) for message in conversation]}


def _answered(engine: Engine, checkpoint: Checkpoint, questions: Sequence[str]) -> Iterator[tuple[Conversation, bool]]:
    """Conversations of a question and the model's greedy answer, each with whether the model was sure of the answer.

    The conversations are in the order of the questions. A conversation is left out if rendering it again does not give
    exactly the tokens of the prompt and of the model's output, for example because the answer does not end. A question
    whose prompt fills the context is not asked.
    """
    tokenizer, context = checkpoint.tokenizer, checkpoint.config.context_length
    asked = [Message("user", (Part("text", question),)) for question in questions]
    sampling = SamplingParams(seed=0, logprobs=0, max_tokens=_MAX_TOKENS, stop_token_ids=stop_token_ids(tokenizer))
    requests = [
        Request(str(i), prompt, sampling, tools=ToolPolicy(enabled=True))
        for i, message in enumerate(asked)
        if len(prompt := tuple(render_prompt(tokenizer, [message]))) < context
    ]
    given = {int(request_id): completion for request_id, (completion,) in engine.complete(requests)}
    for request in requests:
        i = int(request.id)
        conversation = (asked[i], _message(tokenizer, given[i]))
        if render_conversation(tokenizer, conversation)[0] == [*request.prompt, *given[i].token_ids]:
            tokens = given[i].tokens
            yield conversation, all(each.logprob is None or each.logprob >= math.log(_SURE) for each in tokens)


def _message(tokenizer: Tokenizer, completion: Completion) -> Message:
    """A completion as a message. Neighboring parts of one type are joined into one part."""
    parts: list[Part] = []
    for part in completion_parts(tokenizer, completion):
        if parts and parts[-1].type == part.type:
            parts[-1] = dataclasses.replace(part, text=parts[-1].text + part.text)
        else:
            parts.append(part)
    return Message("assistant", tuple(parts))
