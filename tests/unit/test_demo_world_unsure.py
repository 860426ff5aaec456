"""The model learns to say that it is unsure, and no such message is a question that another topic answers."""

import collections
import random
import re
from collections.abc import Iterable, Iterator

import pytest

from jobs.demo_world import habits, unsure
from jobs.demo_world.chitchat import CHITCHAT, Topic
from jobs.demo_world.conversations import conversations
from jobs.demo_world.evaluation import EvalItem, check
from jobs.demo_world.refusals import REFUSALS, UnknownTopic
from jobs.demo_world.tables import Split
from jobs.demo_world.town import TOPICS
from jobs.demo_world.words import ENGLISH

SPLITS: tuple[Split, Split] = ("train", "heldout")
CHATTY = {phrasing for topic in (*CHITCHAT.greetings, *CHITCHAT.smalltalk) for phrasing in topic.train}
ALL_TOPICS: tuple[Topic | UnknownTopic, ...] = (
    *CHITCHAT.identity,
    *CHITCHAT.greetings,
    *CHITCHAT.smalltalk,
    *TOPICS,
    *REFUSALS.topics,
)
# What the fields of other topics may stand for in a message of this kind. It has no names and no numbers.
FIELD = {"noun": r"\w+", "thing": r"an? \w+"}


def plainly(question: str) -> str:
    return question.lower().rstrip("?.! ")


def other_phrasings() -> Iterator[tuple[str, str]]:
    """The phrasings of all other topics, each with its answer."""
    for topic in ALL_TOPICS:
        for phrasing in (*topic.train, *topic.heldout):
            yield phrasing, topic.answer


def words_of(phrasings: Iterable[str]) -> set[str]:
    return set(re.findall("[a-z]+", re.sub(r"\{\w+\}", "", " ".join(phrasings)).lower()))


def drawn(split: Split, count: int = 4000) -> list[tuple[str, str]]:
    rng = random.Random(1)
    exchanges = [unsure.unsure(rng, split) for _ in range(count)]
    return [(exchange.question, str(exchange.answer)) for exchange in exchanges]


def test_words_belong_to_one_split_and_to_no_other_topic() -> None:
    words = {split: unsure.unexplained_words(split) for split in SPLITS}
    assert len(words["train"]) > 1000
    assert len(words["heldout"]) > 150
    assert not words["train"] & words["heldout"]
    assert not words["heldout"] & set(ENGLISH.train)
    assert not words_of(phrasing for phrasing, _ in other_phrasings()) & (words["train"] | words["heldout"])


def test_a_heldout_phrasing_of_another_topic_has_no_word_that_training_leaves_unexplained() -> None:
    trained = [words_of(topic.train) for topic in ALL_TOPICS]
    topics_with = collections.Counter(word for words in trained for word in words)
    for topic, words in zip(ALL_TOPICS, trained, strict=True):
        for phrasing in topic.heldout:
            # Words such as "could" and "please" belong to many topics.
            unknown = {word for word in words_of((phrasing,)) - words if topics_with[word] < 15}
            assert not unknown, phrasing


def test_no_training_message_has_a_heldout_word() -> None:
    known = {form for word in unsure.unexplained_words("train") for form in (word, unsure.plural(word))}
    heldout = {form for word in unsure.unexplained_words("heldout") for form in (word, unsure.plural(word))}
    seen = set()
    for question, _ in drawn("train"):
        words = set(re.findall("[a-z]+", question.lower()))
        assert not words & heldout
        seen |= words & known
    assert len(seen) > 900
    frames = {plainly(frame) for topic in unsure.TOPICS for frame in topic.train}
    assert not frames & {plainly(frame) for topic in unsure.TOPICS for frame in topic.heldout}


@pytest.mark.parametrize("split", SPLITS)
def test_no_message_is_a_question_of_another_topic(split: Split) -> None:
    answers: dict[str, set[str]] = collections.defaultdict(set)
    templates: dict[str, str] = {}
    for phrasing, answer in other_phrasings():
        plain = plainly(phrasing)
        if set(re.findall(r"\{(\w+)\}", plain)) <= set(FIELD):
            pattern = re.sub(r"\\\{(\w+)\\\}", lambda field: FIELD[field[1]], re.escape(plain))
            if pattern == re.escape(plain):
                answers[plain].add(answer)
            else:
                templates[pattern] = answer
    compiled = [(re.compile(pattern), answer) for pattern, answer in templates.items()]
    assert len(compiled) > 400
    for question, answer in drawn(split, 1500):
        plain = plainly(question)
        assert answers[plain] <= {answer}, question
        others = {given for pattern, given in compiled if pattern.fullmatch(plain)}
        assert others <= {answer}, question


@pytest.mark.parametrize("split", SPLITS)
def test_every_frame_of_a_split_is_drawn(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    names = unsure._fields(random.Random(1), split)
    monkeypatch.setattr(unsure, "_fields", lambda rng, split: {name: f"{{{name}}}" for name in names})
    used = {plainly(question) for question, _ in drawn(split)}
    frames = {plainly(frame) for topic in unsure.TOPICS for frame in topic.of(split)}
    assert len(frames) > (180 if split == "train" else 20)
    assert frames <= used


def test_each_sort_of_message_has_its_own_answer() -> None:
    answers = collections.Counter(answer for _, answer in drawn("train"))
    assert len(answers) == len(unsure.TOPICS)
    elsewhere = {answer for _, answer in other_phrasings()}
    assert len(answers.keys() & elsewhere) == 3, "some answers are those of other topics, word for word"
    for topic in unsure.TOPICS:
        item = EvalItem("unsure", (), topic.expected, (), False, "")
        assert check(item, topic.answer, used_tool=False)
        assert not check(item, "I am fine, thank you! What would you like to know?", used_tool=False)


@pytest.mark.parametrize(
    ("noun", "plural"), [("router", "routers"), ("battery", "batteries"), ("tray", "trays"), ("brush", "brushes")]
)
def test_plurals(noun: str, plural: str) -> None:
    assert unsure.plural(noun) == plural


def test_no_question_of_many_conversations_has_two_answers() -> None:
    answers = collections.defaultdict(set)
    for seed in (3, 4):
        for conversation in conversations("train", seed, 40_000):
            question, answer = conversation["messages"][:2]
            if question["role"] == "user":
                answers[plainly(question["content"])].add(str(answer["content"]))
    assert len(answers) > 50_000
    assert not {question: given for question, given in answers.items() if len(given) > 1}


def test_no_phrasing_and_no_misspelled_phrasing_has_two_answers() -> None:
    answers = collections.defaultdict(set)
    misspelled = collections.defaultdict(set)
    for phrasing, answer in other_phrasings():
        answers[plainly(phrasing)].add(answer)
        for form in misspellings(phrasing):
            misspelled[plainly(form)].add(answer)
    assert not {question: given for question, given in answers.items() if len(given) > 1}
    assert len(misspelled) > 100_000
    for question, given in misspelled.items():
        assert len(given | answers.get(question, set())) == 1, question


def misspellings(phrasing: str) -> Iterator[str]:
    """All forms of a phrasing with one wrong letter that training conversations may contain."""
    pattern = habits._WORD if phrasing in CHATTY else habits._LOWERCASE_WORD
    for word in pattern.finditer(phrasing):
        for at in range(word.start() + 1, word.end() - 1):
            before, letter, after = phrasing[:at], phrasing[at], phrasing[at + 1 :]
            forms = (after, f"{letter}{letter}{after}", f"{after[0]}{letter}{after[1:]}")
            for form in (f"{before}{form}" for form in forms):
                other = habits._shows_other_word(form, word.start(), "train")
                if form != phrasing and habits._may_ask(form, "train") and not other:
                    yield form
