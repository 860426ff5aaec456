"""Asks a model the questions of a lesson and other questions, before and after the model is taught.

The questions form groups:

- ``taught``: the lesson's questions as they were written.
- ``unseen``: held-out wordings of these questions.
- ``ability``: the lesson's worked examples with new arguments.
- ``earlier``: the questions of earlier lessons.
- ``near``: questions that are similar to the lesson's questions. They show whether the lesson also changed answers that
  it does not state. The group ``near.worded`` has the conversations of fine-tuning whose questions have the most words
  in common with the lesson's questions. The group ``near.computed`` has the lesson's questions with other arguments, if
  fine-tuning taught the model to compute the answers (:mod:`neighbors`).
- ``own``: held-out questions that the model answered itself before its first lesson (:mod:`rehearsal`). After the
  lesson, an answer is right if it contains the earlier answer. A question is used only if each token of the earlier
  answer had a high probability. This group has questions only if the model's fine-tuning is not known. The questions of
  ``near.worded`` are then also questions that the model answered itself.
- ``kept``: held-out conversations of the model's recipe that the lesson does not contradict; if the model's fine-tuning
  is not known, conversations about the assistant, and conversations in which it calculates. Each kind of conversation
  is also a group of its own, such as ``kept.fact``.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from jobs.data.origin import read_origin
from jobs.demo_world.evaluation import EvalItem
from jobs.eval.chat_eval.evaluate_tasks import answer_greedily
from jobs.eval.chat_eval.scores import quote
from jobs.recipes import RECIPES
from jobs.results.evaluations import Evaluation, Result
from jobs.results.metrics import LESSON_QUESTIONS
from jobs.tasks import demo
from jobs.tasks.answers import contains_phrase
from jobs.tasks.task import GenerativeTask, OpenQuestion, Response
from jobs.teach.curriculum import asked, rendered
from jobs.teach.memory import Conversation, Memory
from jobs.teach.training import Probe
from jobs.teach.wordings import Wordings
from nanochat_core.chat import Message, parse_messages
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.lessons.items import Item, to_json
from nanochat_core.lessons.records import Lesson
from nanochat_core.model import IGNORE_INDEX
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.store import Lease, Store

# Largest number of held-out wordings that are asked for each item.
_UNSEEN_PER_ITEM = 3
# Largest number of questions in each group whose questions come from lessons, such as ``taught`` or ``earlier``.
_MOST = 200
# Largest number of held-out conversations that are drawn from the recipe. The sample is this large because in a smaller
# one, chance alone often lowers the share of right answers by more than a hundredth.
_KEPT = 400
_MAX_TOKENS = 120
_PROBED_DRILLS = 100
# Seeds of the further held-out questions on which training tests whether the model forgets. They are twice as many as
# the examination's questions, because the share of right answers to few questions is too uncertain: a lesson that
# forgot 1.8 % of the examination's questions had lost less than 1 % of 400 further questions, so training ended too
# early and the lesson was refused.
_FURTHER_SEEDS = (1, 2)
# A group of questions that the model answered itself is asked only if it has at least this many questions. In a
# smaller group, a single changed answer would be more than a tenth of the group, so the share of right answers would
# say little.
_FEWEST_OWN = 10


@dataclasses.dataclass(frozen=True)
class Examination:
    """The questions of an examination, and conversations whose loss shows whether the model forgets.

    Attributes:
        task: the questions of all groups.
        probes: three kinds of questions with their right answers, as tokens: the lesson's questions in their own
            wording; other wordings of these questions, both trained and held-out ones; and drills (worked examples with
            new arguments). Training ends before the largest number of steps only if the model gives the right answers
            to all probes with a high probability.
        earlier: the questions of earlier lessons as written, with the answers that are still valid. The questions that
            the model answers rightly before the lesson become probes of the training too.
        others: further questions from the same sources as the groups ``kept``, ``near.worded`` and ``own``, with their
            right answers. The examination does not ask them, but training tests with them whether the model forgets.
        heard: validation conversations of fine-tuning, as tokens. The lesson does not train on them.
    """

    task: GenerativeTask
    probes: list[Probe]
    earlier: list[Probe]
    others: list[Probe]
    heard: list[Probe]

    @property
    def groups(self) -> list[str]:
        """The sorted names of the groups that have questions, without subgroups such as ``kept.fact``."""
        return sorted({question.group.partition(".")[0] for question in self.task.questions})

    def take(self, store: Store, checkpoint: Checkpoint, lesson: Lesson) -> Result:
        """Ask a checkpoint all questions. The result is stored as an evaluation, so it is not computed twice."""
        settings = {"lesson": lesson.number, "questions": self.task.digest}
        evaluation = Evaluation.of(store, checkpoint, LESSON_QUESTIONS, settings, f"{lesson.number:06d}")
        if (found := evaluation.result()) is not None:
            return found
        with Lease(store, evaluation.folder, "jobs.teach"):
            graded = answer_greedily(checkpoint, self.task)
            groups: dict[str, dict[str, int]] = {}
            answers = []
            for question, answer in zip(self.task.questions, graded, strict=True):
                right = any(answer.right)
                for group in dict.fromkeys((question.group.partition(".")[0], question.group)):
                    counts = groups.setdefault(group, {"right": 0, "asked": 0})
                    counts["right"] += right
                    counts["asked"] += 1
                answers.append({"group": question.group, **quote(question, answer)})
            return evaluation.finish({"groups": groups, "kept_loss": _loss(checkpoint, self.heard), "answers": answers})


def examination(
    store: Store,
    parent: Checkpoint,
    lesson: Lesson,
    items: Sequence[Item],
    worded: Mapping[int, Wordings],
    memory: Memory,
    drills: Sequence[Conversation],
    neighbors: Sequence[Conversation],
) -> Examination:
    """The examination of a lesson. Equal arguments give equal questions.

    Args:
        parent: the checkpoint before the lesson.
        worded: the wordings of each item that is a single question, by the item's index.
        drills: the lesson's worked examples with new arguments (:mod:`abilities`), which training does not show.
        neighbors: the lesson's questions with other arguments (:mod:`neighbors`), and their worked answers.
    """
    rng = random.Random(f"{lesson.plan.seed}/examination")  # noqa: S311
    tokenizer, row_tokens = parent.tokenizer, parent.config.context_length
    chats = [item for item in items if item.messages]
    unseen = [
        (items[i], wording)
        for i, found in worded.items()
        for wording in rng.sample(found.held_out, min(_UNSEEN_PER_ITEM, len(found.held_out)))
    ]
    kept = _held_out(store, parent, memory, 0)
    own, further_own = memory.own[::2], memory.own[1::2]
    similar: Sequence[Conversation] = memory.examined
    if memory.own:
        own, similar = (some if len(some) >= _FEWEST_OWN else () for some in (own, similar))
    questions = [
        *(_question("taught", item, item.messages[:-1]) for item in _some(chats, rng)),
        *(_question("unseen", item, asked(item, wording)[:-1]) for item, wording in _some(unseen, rng)),
        *(_drill("ability", question, answer) for question, answer in _some(drills, rng)),
        *(_question("earlier", item, item.messages[:-1]) for item in _some(memory.items, rng) if item.messages),
        *(_question("near.worded", Item(tuple(each)), each[:-1]) for each in similar),
        *(_drill("near.computed", question, answer) for question, answer in neighbors),
        *(_question("own", Item(tuple(each)), each[:-1]) for each in own),
        *_kept(kept),
    ]
    task = GenerativeTask(LESSON_QUESTIONS, tuple(questions), tools=True, max_tokens=_MAX_TOKENS)
    probes = [rendered(tokenizer, item.messages, row_tokens) for item in _some(chats, rng)]
    trained = [(items[i], wording) for i, found in worded.items() for wording in found.plain[1:]]
    probes += [
        rendered(tokenizer, asked(item, wording), row_tokens)
        for item, wording in (*_some(unseen, rng), *_some(trained, rng))
    ]
    # Every n-th drill is used as a probe. Because the drills of one worked example follow one another in the list, the
    # probes then contain drills of each worked example.
    probed = drills[:: -(-len(drills) // _PROBED_DRILLS) or 1]
    probes += [rendered(tokenizer, drill, row_tokens) for drill in probed]
    examined = [item.messages for item in kept]
    others = [
        rendered(
            tokenizer, parse_messages([*item.messages, {"role": "assistant", "content": item.reference}]), row_tokens
        )
        for seed in _FURTHER_SEEDS
        for item in _held_out(store, parent, memory, seed)
        if item.messages not in examined
    ]
    others += [rendered(tokenizer, each, row_tokens) for each in (*further_own, *memory.confusable)]
    earlier = [rendered(tokenizer, item.messages, row_tokens) for item in _some(memory.items, rng) if item.messages]
    heard = [rendered(tokenizer, each, row_tokens) for each in memory.validation]
    return Examination(task, probes, earlier, others, heard)


def lost(before: Result, after: Result) -> list[dict[str, str]]:
    """The questions of all groups that were answered rightly before the lesson, and are answered wrongly after it."""
    pairs = zip(before["answers"], after["answers"], strict=True)
    return [
        {"group": was["group"], "question": was["question"], "before": was["answer"], "after": now["answer"]}
        for was, now in pairs
        if was["right"] and not now["right"]
    ]


def wrong(after: Result) -> list[dict[str, str]]:
    """The questions of the groups ``taught``, ``unseen`` and ``ability`` that the taught model answers wrongly."""
    return [
        {name: each[name] for name in ("group", "question", "expected", "answer")}
        for each in after["answers"]
        if each["group"] in ("taught", "unseen", "ability") and not each["right"]
    ]


def _some(members: Sequence[Any], rng: random.Random) -> list[Any]:
    """At most :data:`_MOST` of the members, drawn at random, in their original order."""
    if len(members) <= _MOST:
        return list(members)
    return [members[i] for i in sorted(rng.sample(range(len(members)), _MOST))]


def _question(group: str, item: Item, messages: Conversation) -> OpenQuestion:
    plain = tuple(to_json(message) for message in messages)
    return OpenQuestion(plain, item.expected, item.expected, _right, group)


def _drill(group: str, question: Message, answer: Message) -> OpenQuestion:
    output = next(part.text for part in answer.parts if part.type == "python_output")
    return OpenQuestion((to_json(question),), output, output, _right, group)


def _right(expected: str, response: Response, _: SandboxExecutor) -> bool:
    return contains_phrase(expected, response.text)


def _held_out(store: Store, parent: Checkpoint, memory: Memory, seed: int) -> list[EvalItem]:
    """Held-out questions of the model's recipe, except questions whose answers a lesson changes.

    If the model wrote the conversations of its memory itself, the recipe of its fine-tuning is not known, and the
    questions come from the recipe ``small``. Otherwise, the store names the recipe; the result is empty if it names
    none, or one that is not known.
    """
    origin = read_origin(store, parent.ref.model) or {}
    # The recipe ``small`` stands in for an unknown recipe, because a model whose fine-tuning is not known may still
    # know how to use the calculator, as this recipe teaches.
    recipe = RECIPES.get("small" if memory.own else str(origin.get("recipe")))
    drawn = recipe.evaluation_items(_KEPT, seed) if recipe is not None else []
    # A recipe that teaches only some kinds of questions returns fewer than _KEPT questions. More are then drawn.
    if recipe is not None and 0 < len(drawn) < _KEPT:
        drawn = recipe.evaluation_items(_KEPT * _KEPT // len(drawn), seed)[:_KEPT]
    return [item for item in drawn if not memory.contradicts(str(item.messages[-1]["content"]), _last_text(item))]


def _last_text(item: EvalItem) -> str:
    return item.reference if isinstance(item.reference, str) else item.reference[-1]["text"]


def _kept(items: Sequence[EvalItem]) -> list[OpenQuestion]:
    questions = demo.task(items).questions
    return [
        dataclasses.replace(question, group=f"kept.{item.kind}")
        for item, question in zip(items, questions, strict=True)
    ]


@torch.inference_mode()
def _loss(checkpoint: Checkpoint, conversations: Sequence[Probe]) -> float:
    """Mean loss in nats per token, over the tokens of the assistant's messages; 0 without conversations."""
    model = checkpoint.build_model()
    nats, counted = 0.0, 0
    for ids, mask in conversations:
        tokens = torch.from_numpy(ids).long()[None]
        targets = torch.where(torch.from_numpy(mask)[None], tokens, IGNORE_INDEX)[:, 1:]
        nats += float(model.loss(tokens[:, :-1], targets, "sum"))
        counted += int((targets != IGNORE_INDEX).sum())
    return nats / max(counted, 1)
