"""The conversations of fine-tuning and the items of earlier lessons that a model must not forget during a lesson.

Answers that the new lesson contradicts are found and replaced.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence, Set

from jobs.results.metrics import ancestors
from jobs.teach.rehearsal import HELD_OUT, rehearse
from jobs.teach.wordings import (
    NAME_INTENT,
    Wordings,
    is_intent,
    keywords,
    statement_questions,
    with_statements,
    wordings,
)
from jobs.train.batches.mixtures import Mixture, Selection
from nanochat_core.chat import Message, Part
from nanochat_core.checkpoint import Checkpoint, load_meta
from nanochat_core.errors import UserError
from nanochat_core.lessons.items import Item, normal
from nanochat_core.lessons.records import Lesson, NoLesson, Plan, read_lesson, read_lesson_items
from nanochat_core.store import Store

log = logging.getLogger("jobs.teach")

Conversation = Sequence[Message]

# Largest number of fine-tuning conversations that are searched for contradictions of the lesson. Training repeats some
# of these conversations.
_REMEMBERED = 20_000
_VALIDATION = 128
# Largest number of conversations in Memory.examined, and also in Memory.confusable.
_EXAMINED = 100
# Largest number of conversations in Memory.similar.
_SIMILAR = 400
# Answers such as "I don't know that." contain no knowledge, so a lesson may replace them without a conflict.
_UNKNOWN = re.compile(r"\b(?:don['’]t|do not|cannot|can['’]t) (?:know|say|tell|answer)|no idea", re.IGNORECASE)
# Shortest replaced answer, in characters, that is also looked for in the answers to other questions. A shorter answer,
# such as "Yes.", is right for many questions.
_SHORTEST = 12
# Words that say nothing about the subject of a question.
_FRAME_WORD = re.compile("i|me|my|you|your|know|tell|about|please|answer|called|name|have|has|get|go|old|color")
_NAMED = re.compile(r"\b(?:[Ii] am|I['’]m|[Mm]y name is|[Cc]alled) ([\w-]+)")


@dataclasses.dataclass(frozen=True)
class Conflict:
    """An answer that a lesson replaces.

    Attributes:
        question: the lesson's question.
        before: the earlier answer.
        after: the lesson's answer.
        source: the origin of the earlier answer: fine-tuning or a lesson.
        worked: whether the earlier answer was computed with code. The same text, such as "The answer is 7.", may then
            still be the right answer to other questions.
    """

    question: str
    before: str
    after: str
    source: str
    worked: bool = False

    def touches(self, answer: str) -> bool:
        """Whether ``answer``, which answers another question, contains the earlier answer that the lesson replaces.

        Always False if the earlier answer is short or was computed with code.
        """
        return not self.worked and len(self.before) >= _SHORTEST and self.before in answer

    def to_json(self) -> dict[str, str]:
        return {"question": self.question, "before": self.before, "after": self.after, "from": self.source}


@dataclasses.dataclass(frozen=True)
class Memory:
    """The conversations and items that a model has to remember during a lesson.

    Attributes:
        conversations: conversations of fine-tuning in random order. Their answers agree with the lesson.
        validation: validation conversations of fine-tuning that the lesson does not change.
        near: the members of ``conversations`` that the model could confuse with the lesson: a question has a keyword of
            the lesson's questions, or an answer says that the model does not know. A conversation with an answer of
            the lesson is left out.
        examined: conversations whose last questions are the most similar to the lesson. The lesson is examined with
            them, so they are in neither ``conversations`` nor ``near``. If the model wrote the conversations itself,
            they are in ``validation``.
        similar: further members of ``near`` that are about as similar to the lesson as ``examined``, and then the next
            most similar ones. Training repeats them more often than the others. Empty if the model wrote the
            conversations itself.
        items: items of the model's earlier lessons that are still valid: neither the lesson nor a later one of the
            earlier lessons asks their questions.
        conflicts: the earlier answers that the lesson replaces. The lesson's result shows them to the user.
        replaced: answers of fine-tuning that the lesson or an earlier lesson replaces. The result of an earlier lesson
            has already shown the answers that this earlier lesson replaced.
        answered: maps each wording of a question, in the form that :func:`normal` returns, to the item that answers it:
            an item of the lesson, or an item of an earlier lesson that is still valid.
        own: the members of ``validation`` that are not in ``examined``, if the model wrote the conversations itself
            (:mod:`rehearsal`); empty otherwise.
    """

    conversations: list[Conversation]
    validation: list[Conversation]
    near: list[Conversation]
    examined: list[Conversation]
    similar: list[Conversation]
    items: list[Item]
    conflicts: list[Conflict]
    replaced: list[Conflict]
    answered: Mapping[str, Item]
    own: Sequence[Conversation] = ()

    @property
    def confusable(self) -> list[Conversation]:
        """The first members of :attr:`similar`, with which training tests whether the model confuses them."""
        return self.similar[:_EXAMINED]

    def contradicts(self, question: str, answer: str) -> bool:
        """Whether the lesson or an earlier lesson changes the right answer of a question, or asks the question itself.

        ``answer`` is the right answer before all lessons.
        """
        return normal(question) in self.answered or any(
            each.touches(answer) for each in (*self.conflicts, *self.replaced)
        )


def lineage(meta: Mapping[str, object]) -> list[int]:
    """The numbers of the lessons that a checkpoint with the metadata ``meta`` has learned, the oldest first."""
    found = meta.get("lessons", [])
    return [int(each) for each in found] if isinstance(found, list) else []


def all_wordings(items: Sequence[Item]) -> dict[int, Wordings]:
    """The wordings of each item that is a single question, by the item's index."""
    return {i: wordings(item.question, item.wordings) for i, item in enumerate(items) if item.alone}


def asked_by(items: Sequence[Item], worded: Mapping[int, Wordings]) -> dict[str, Item]:
    """Maps each wording, in the form that :func:`normal` returns, to the item whose question it asks.

    ``worded`` are the :func:`all_wordings` of ``items``.
    """
    return {normal(each): items[i] for i, found in worded.items() for each in found.all}


def check_agreement(items: Sequence[Item], worded: Mapping[int, Wordings]) -> None:
    """Raise UserError if two items with different answers ask the same question.

    Two items ask the same question if the question of one item, as it is written, is a wording of the other item's
    question. ``worded`` are the :func:`all_wordings` of ``items``.
    """
    written = {normal(items[i].question): items[i] for i in worded}
    for i, found in worded.items():
        for wording in found.all:
            other = written.get(normal(wording))
            if other is not None and other.answer != items[i].answer:
                raise UserError(
                    f"the lesson answers {other.question!r} differently from {items[i].question!r}, which asks the "
                    "same; keep one of the two"
                )


def remember(
    store: Store,
    parent: Checkpoint,
    lesson: Lesson,
    asked: Mapping[str, Item],
    worked: Callable[[Sequence[Item]], list[Item]],
) -> Memory:
    """The conversations and items that ``parent`` has to remember during a lesson.

    Args:
        asked: the lesson's items by their wordings (:func:`asked_by`).
        worked: adds the output of Python code to the items of earlier lessons.

    Raises:
        UserError: an earlier lesson is damaged, the conversations that the plan names are missing, or the model has to
            write conversations and cannot.
    """
    mixture, rehearsed = _mixture(store, parent, lesson.plan)
    rng = random.Random(f"{lesson.plan.seed}/memory")  # noqa: S311
    training = _sample(mixture.training, _REMEMBERED, rng)
    validation = _sample(mixture.validation, HELD_OUT if rehearsed else _VALIDATION, rng)
    taught = _taught_items(store, lesson.model, lineage(parent.meta))
    valid, earlier_conflicts = _earlier(taught, asked)
    kept = worked(valid)
    # ``answered`` includes the answers of earlier lessons, because the conversations of fine-tuning still have the
    # answers that earlier lessons replaced. Otherwise, each new lesson would teach the model the replaced answers
    # again.
    answered = {**asked_by(kept, all_wordings(kept)), **asked}
    training, validation = (
        _without_subjects(each, answered, only_unknown=not rehearsed) for each in (training, validation)
    )
    replaced = _conflicts([*training, *validation] if rehearsed else training, answered)
    new = {item.question for item in asked.values()} - _answered_before(taught, asked)
    conflicts = [each for each in replaced if each.question in new]
    names = _renamed(replaced)
    agreed = [each for one in training if (each := _agreeing(one, replaced, answered, names)) is not None]
    validation = [each for one in validation if (each := _agreeing(one, replaced, answered, names)) == one]
    words = {word for each in asked.values() for word in keywords(each.question).split()}
    answers = {each.answer for each in asked.values()}

    def near_to(conversation: Conversation) -> bool:
        pairs = question_pairs(conversation)
        similar = any(words & {*keywords(asks.text).split()} or _UNKNOWN.search(said.text) for asks, said in pairs)
        return similar and not any(said.text in answers for _, said in pairs)

    near, near_apart = ([one for one in some if near_to(one)] for some in (agreed, validation))
    if rehearsed:
        examined, repeated = _most_similar(near_apart, words, rng)[:_EXAMINED][: len(near_apart) // 2], []
    else:
        # The most similar conversations are divided: the first, third, fifth and so on are examined, and training
        # repeats the second, fourth and so on. If training repeated none of the most similar conversations, the model
        # could confuse these conversations with the lesson.
        similar = _most_similar(near, words, rng)
        examined, repeated = similar[: 2 * _EXAMINED : 2], similar[1 : 2 * _EXAMINED : 2] + similar[2 * _EXAMINED :]
    apart = {id(one) for one in examined}
    agreed, near, own = ([one for one in some if id(one) not in apart] for some in (agreed, near, validation))
    return Memory(
        agreed,
        validation,
        near,
        examined,
        repeated[:_SIMILAR],
        kept,
        [*conflicts, *earlier_conflicts],
        replaced,
        answered,
        own if rehearsed else [],
    )


def _most_similar(near: Sequence[Conversation], words: Set[str], rng: random.Random) -> list[Conversation]:
    """The conversations, sorted by the similarity of their last questions to the lesson's questions, highest first.

    ``words`` are the keywords of the lesson's questions. The similarity of a question is the share of its keywords that
    are in ``words``. If several conversations differ only in the last answer, one of them is returned. Conversations
    that do not end with an answer, or whose last question has no word in ``words``, are left out.
    """

    def similarity(conversation: Conversation) -> float:
        has = {*keywords(conversation[-2].text).split()}
        return len(has & words) / max(1, len(has))

    answered = [one for one in near if one[-1].role == "assistant" and one[-1].text.strip() and similarity(one)]
    distinct = {tuple(message.text for message in one[:-1]): one for one in answered}
    drawn = rng.sample(list(distinct.values()), len(distinct))
    return sorted(drawn, key=similarity, reverse=True)


def _mixture(store: Store, parent: Checkpoint, plan: Plan) -> tuple[Mixture, bool]:
    """The mixture of conversations that ``plan`` names; by default, the mixture on which the model was fine-tuned.

    If the default mixture is not known or not in the store, the model writes conversations itself, with weights from
    before its first lesson. These are the weights of the checkpoint whose settings name the mixture. If no checkpoint
    names one, they are the weights of the model's oldest checkpoint that is not a base model. The second value says
    whether the model wrote the conversations.

    Raises UserError if ``plan`` names a mixture that does not exist, or if the model has to write conversations and
    cannot.
    """
    if plan.replay:
        return Mixture(store, plan.replay), False
    oldest, named = parent.ref, str(parent.meta.get("settings", {}).get("mixture", ""))
    for _, ref in () if named else ancestors(store, parent):
        named = str(load_meta(store, ref).get("settings", {}).get("mixture", ""))
        oldest = ref if ref.stage != "base" else oldest
        if named:
            break
    try:
        if named:
            return Mixture(store, named), False
    except UserError as error:
        log.warning("the conversations of fine-tuning are missing", extra={"mixture": named, "reason": str(error)})
    return Mixture(store, rehearse(store, oldest)), True


def _without_subjects(
    conversations: Sequence[Conversation], asked: Mapping[str, Item], *, only_unknown: bool
) -> list[Conversation]:
    """The conversations, without those that may ask for the fact of a lesson in other words than the lesson.

    A question may ask for a lesson's fact if a question of the lesson has all words of its subject: if the lesson asks
    "Who is my dentist?", a conversation with "Who is the dentist?" is left out. The model's earlier answer to this
    question, such as "I don't know a dentist.", is then neither repeated nor examined. A question of the lesson itself
    stays, because the lesson's answer takes the place of the earlier answer. With ``only_unknown``, a conversation is
    left out only if the model's earlier answer says that the model does not know.
    """
    subjects = [_subject(item.question) for item in asked.values()]

    def stays(question: Message, answer: Message) -> bool:
        subject = _subject(_parts(question.text)[-1])
        if not subject or (only_unknown and not _UNKNOWN.search(answer.text)):
            return True
        return not any(subject <= each for each in subjects) or _item_for(question.text, asked) is not None

    return [one for one in conversations if all(stays(*pair) for pair in question_pairs(one))]


def _subject(question: str) -> set[str]:
    """The words that name the subject of a question."""
    words = keywords(question).split()
    return {word.removesuffix("'s") for word in words if not _FRAME_WORD.fullmatch(word)}


def _sample(selection: Selection, most: int, rng: random.Random) -> list[Conversation]:
    return [selection[i] for i in rng.sample(range(len(selection)), min(most, len(selection)))]


def question_pairs(conversation: Conversation) -> list[tuple[Message, Message]]:
    """Each question of a conversation with its answer."""
    found = itertools.pairwise(conversation)
    return [(asked, said) for asked, said in found if (asked.role, said.role) == ("user", "assistant")]


def _conflicts(conversations: Sequence[Conversation], asked: Mapping[str, Item]) -> list[Conflict]:
    """The conflicts with conversations that answer a question of the lesson differently from the lesson."""
    found: dict[tuple[str, str], Conflict] = {}
    for conversation in conversations:
        for question, answer in question_pairs(conversation):
            item = _item_for(question.text, asked)
            before = answer.text.strip()
            if item is None or before == item.answer.strip() or _UNKNOWN.search(before):
                continue
            worked = any(part.type != "text" for part in answer.parts)
            conflict = Conflict(item.question, before, item.answer, "fine-tuning", worked)
            found.setdefault((item.question, before), conflict)
    return list(found.values())


def _item_for(question: str, asked: Mapping[str, Item]) -> Item | None:
    """The item of the lesson that asks ``question``, which may begin with a greeting such as "Hello!"."""
    if item := asked.get(normal(question)):
        return item
    parts = _parts(question)
    return asked.get(normal(parts[-1])) if len(parts) > 1 else None


def _parts(question: str) -> list[str]:
    """The sentences of a question. A colon ends a sentence, too."""
    return re.split(r"(?<=[.!?:])\s+", question.strip())


def _agreeing(
    conversation: Conversation, conflicts: Sequence[Conflict], asked: Mapping[str, Item], names: Mapping[str, str]
) -> Conversation | None:
    """The conversation with the lessons' answers and names in place of the answers and names that they replace.

    The answers and names are those of the lesson, and of earlier lessons if they are still valid. The result is None if
    a replaced answer occurs in the answer to another question of the conversation (:meth:`Conflict.touches`), and that
    other question mentions it: the question has a keyword of the replaced answer that is neither in the new answer nor
    in the new answer's question.
    """
    messages = list(conversation)
    for i, message in enumerate(messages):
        if message.role != "assistant" or not i:
            continue
        question = messages[i - 1].text
        item = _item_for(question, asked)
        if item is not None:
            messages[i] = item.messages[-1]
            continue
        parts = []
        for part in message.parts:
            text = part.text
            if part.type == "text":
                for conflict in conflicts:
                    if conflict.touches(text):
                        if _mentions(question, conflict):
                            return None
                        text = text.replace(conflict.before, conflict.after)
                for old, new in names.items():
                    text = re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _, new=new: new, text)  # type: ignore[misc]
            parts.append(Part(part.type, text))
        messages[i] = Message("assistant", tuple(parts))
    return messages


def _mentions(question: str, conflict: Conflict) -> bool:
    """Whether a question has a word of the earlier answer that neither the new answer nor the lesson's question has."""
    gone = {*keywords(conflict.before).split()} - {*normal(conflict.after).split(), *normal(conflict.question).split()}
    return bool(gone & {*normal(question).split()})


def _renamed(conflicts: Sequence[Conflict]) -> dict[str, str]:
    """Maps each earlier name of the assistant to the new name; empty if the lesson does not change the name."""
    found = {}
    for conflict in conflicts:
        if is_intent(conflict.question, NAME_INTENT):
            old, new = _NAMED.search(conflict.before), _NAMED.search(conflict.after)
            if old and new and old[1] != new[1]:
                found[old[1]] = new[1]
    return found


def _taught_items(store: Store, model: str, numbers: Sequence[int]) -> dict[int, list[Item]]:
    """The items of each lesson in ``numbers``, the newest lesson first.

    A lesson that somebody has removed from the store is left out. Raises UserError if a lesson is damaged.
    """
    found = {}
    for number in reversed(numbers):
        try:
            found[number] = with_statements(read_lesson_items(store, read_lesson(store, model, number)))
        except NoLesson as error:
            log.warning("the items of an earlier lesson are not repeated", extra={"reason": str(error)})
    return found


def _earlier(taught: Mapping[int, list[Item]], asked: Mapping[str, Item]) -> tuple[list[Item], list[Conflict]]:
    """The items of earlier lessons that are still valid, and the answers of these lessons that the new lesson changes.

    An item stays valid unless its question is asked again, in any wording, by the new lesson or by a lesson after the
    item's own. Only items that consist of one question and its answer count as asking; a question inside a longer
    conversation does not. A text has the questions that its statements answer, and stays valid unless one of them is
    asked again. A longer conversation always stays valid. An answer that another earlier lesson has already replaced
    does not count as changed by the new lesson.
    """
    kept: dict[str, Item] = {}
    conflicts = []
    later = set[str]()
    for number, items in taught.items():
        answered = set[str]()
        for item in items:
            questions = _questions(item)
            replaced = not later.isdisjoint(questions)
            other = _same_question(item, questions, asked)
            if other is not None and other.answer != item.answer and not replaced:
                conflicts.append(Conflict(item.question, item.answer.strip(), other.answer, f"lesson {number}"))
            if not replaced and asked.keys().isdisjoint(questions):
                kept.setdefault(repr(item.row()), item)
            if item.alone:
                answered |= questions
        later |= answered
    return list(kept.values()), conflicts


def _answered_before(taught: Mapping[int, list[Item]], asked: Mapping[str, Item]) -> set[str]:
    """The questions of the new lesson that an earlier lesson has answered already."""
    items = [item for each in taught.values() for item in each]
    return {other.question for item in items if (other := _same_question(item, _questions(item), asked))}


def _questions(item: Item) -> set[str]:
    """The wordings of the questions that an item answers, as :func:`normal` returns them.

    The set is empty for a conversation of several turns.
    """
    if item.alone:
        return {normal(each) for each in wordings(item.question, item.wordings).all}
    return {normal(each) for questions, _ in statement_questions(item.text) for each in questions}


def _same_question(item: Item, questions: set[str], asked: Mapping[str, Item]) -> Item | None:
    """The item in ``asked`` that has a wording in common with the question of ``item``; None if there is none.

    ``questions`` are the :func:`_questions` of ``item``. The result is None for an item that is not a single question.
    """
    if not item.alone:
        return None
    return asked.get(normal(item.question)) or next((asked[each] for each in sorted(questions & asked.keys())), None)
