"""Makes many wordings of a question from templates, without another model, and holds some of the wordings out.

The problem: a small model that has seen a question in only one wording answers only this wording. Three kinds of
further wordings solve it:

- *Rewrites* change the words of frequent kinds of questions: "What is my dog's name?" is also "What is my dog called?".
- *Frames* put a question into other sentences: "Tell me what my dog's name is.", "Hello! What is my dog's name?".
- *Casual* questions lack capitals, punctuation or words that carry no meaning, or two of their parts are exchanged. The
  random deletion of words follows EDA (arXiv 1901.11196).

Every third rewrite and some of the frames are held out from training. The answers to these wordings show whether the
model learned the fact or only the sentences.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence

from nanochat_core.lessons.items import Item, normal

_FUNCTION_WORD = re.compile(
    "a|an|the|is|are|was|were|be|do|does|did|what|which|who|whose|whom|where|when|how|of|to|in|on|at|for|it|that"
)
# If a question begins with one of these words, the word loses its capital letter inside another sentence.
_START = re.compile(
    "what|who|whom|whose|where|when|which|why|how|is|are|was|were|do|does|did|can|could|will|would|should|has|have|had"
    "|in|on|at|by|for|from|to|the|my|your|our|his|her|their|its|tell|name|say|give|please"
)

_CLAUSE_FRAMES = (
    "Tell me {clause}.",
    "Please tell me {clause}.",
    "Can you tell me {clause}?",
    "Do you know {clause}?",
    "I want to know {clause}.",
    "I wonder {clause}.",
    "Remind me {clause}.",
)
_QUESTION_FRAMES = (
    "Hi! {question}",
    "Hello! {question}",
    "I have a question. {question}",
    "Please answer this: {question}",
    "{question} Please tell me.",
    "So, {small}",
)
_COMMAND_FRAMES = ("Please {small}.", "Can you {small}?", "Now {small}.", "I want you to {small}.")
_HELD_OUT_COMMAND_FRAMES = ("Could you {small}, please?", "Would you {small}?")
_HELD_OUT_CLAUSE_FRAMES = ("Could you tell me {clause}?", "I would like to know {clause}.")
_HELD_OUT_QUESTION_FRAMES = ("Excuse me! {question}", "Another question: {small}")

# Pairs of a pattern, and other forms in which a question that matches the pattern can be asked.
_REWRITES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"what is (.+?)(?:'s|’s) name",
        (r"what is \1 called", r"what is the name of \1", r"what do you call \1", r"which name does \1 have"),
    ),
    (
        r"what is the name of (.+)",
        (
            r"what is \1 called",
            r"what do you call \1",
            r"which name does \1 have",
            r"how is \1 called",
            r"what is \1's name",
        ),
    ),
    (
        r"what (?:is|are) (.+) called",
        (
            r"what is the name of \1",
            r"what do you call \1",
            r"which name does \1 have",
            r"how is \1 called",
            r"what is \1's name",
        ),
    ),
    (r"how old (?:is|am) (.+)", (r"what is the age of \1", r"what age is \1", r"how many years old is \1")),
    (
        r"where does (.+) live",
        (r"in which place does \1 live", r"where is the home of \1", r"where is \1 at home", r"what is the home of \1"),
    ),
    (r"where do (i|you|we|they) live", (r"in which place do \1 live", r"where is it that \1 live")),
    (
        r"where does (.+) work",
        (r"in which place does \1 work", r"what is the place of work of \1", r"where is it that \1 works"),
    ),
    (
        r"where (?:is|are) (.+)",
        (r"in which place is \1", r"where can i find \1", r"what is the location of \1", r"where would i find \1"),
    ),
    (
        r"when was (.+) born",
        (r"what is the birthday of \1", r"on which date was \1 born", r"in which year was \1 born"),
    ),
    (
        r"when is (.+)",
        (r"what is the date of \1", r"on which day is \1", r"at what time is \1", r"when does \1 happen"),
    ),
    (
        r"when (?:does|do) (.+) (start|begin)",
        (r"at what time does \1 begin", r"when does \1 start", r"what time does \1 start"),
    ),
    (
        r"who (made|created|built|trained) (.+)",
        (r"who created \2", r"who was it that built \2", r"who is the maker of \2"),
    ),
    (r"who (wrote|painted|composed) (.+)", (r"who is the author of \2", r"by whom is \2", r"who was it that \1 \2")),
    (
        r"what colou?r (?:is|are) (.+)",
        (r"which color is \1", r"what is the color of \1", r"which color does \1 have"),
    ),
    (
        r"what is (.+?)(?:'s|’s) favou?rite (.+)",
        (r"which \2 does \1 like best", r"what \2 does \1 prefer", r"what is the favorite \2 of \1"),
    ),
    (r"what is my favou?rite (.+)", (r"which \1 do i like best", r"what \1 do i prefer", r"which \1 is my favorite")),
    (r"what is (.+?)(?:'s|’s) (.+)", (r"what is the \2 of \1", r"which \2 does \1 have", r"what \2 does \1 have")),
    (r"what is my (.+)", (r"which \1 do i have", r"what would my \1 be", r"what \1 is mine")),
    (r"what is the (.+?) of (.+)", (r"which \1 does \2 have", r"what \1 does \2 have")),
    (r"what is the (.+)", (r"what would the \1 be", r"which is the \1", r"what is this \1")),
    (r"how many (.+?) (?:does|do) (.+) have", (r"what is the number of \1 of \2", r"how many \1 are there with \2")),
    (r"who is (.+)", (r"what is the name of \1", r"what is \1 called", r"which person is \1")),
    (r"which (.+)", (r"what \1",)),
    (r"what (\w+) (does|do|did|has|have) (.+)", (r"which \1 \2 \3",)),
)
# Pairs of a word and another word that means the same in many questions.
_SYNONYMS = (
    ("favourite", "favorite"), ("favorite", "favourite"), ("colour", "color"), ("color", "colour"),
    ("created", "made"), ("made", "built"), ("phone", "telephone"), ("telephone", "phone"), ("car", "vehicle"),
    ("mom", "mother"), ("mum", "mother"), ("mother", "mom"), ("dad", "father"), ("father", "dad"),
    ("start", "begin"), ("begin", "start"), ("begins", "starts"), ("starts", "begins"), ("job", "profession"),
    ("house", "home"), ("kids", "children"), ("children", "kids"), ("big", "large"), ("birthday", "date of birth"),
)  # fmt: skip

# Sets of questions that ask an assistant the same thing. Each set is divided into wordings for training and held-out
# wordings. A question that is in a set gets all wordings of the set.
_INTENTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "What is your name?", "Who are you?", "What are you called?", "Tell me your name.", "Do you have a name?",
            "What should I call you?", "Who am I talking to?", "Introduce yourself.", "Please tell me who you are.",
            "Tell me about yourself.", "What are you?", "I wonder what your name is.", "Who is this?",
        ),
        ("May I ask your name?", "Who am I speaking to?", "Please introduce yourself."),
    ),
    (
        (
            "Who made you?", "Who created you?", "Who built you?", "Who trained you?", "Who is your maker?",
            "Where do you come from?", "How were you made?", "Tell me who made you.", "Who was it that made you?",
            "I want to know who made you.", "Who developed you?",
        ),
        ("Can you tell me who made you?", "Who was it that built you?", "Who is your creator?"),
    ),
)  # fmt: skip
NAME_INTENT = 0

# Sentences with this many characters or more are not compared with the patterns below, because the time to match a
# pattern with several parts ``(.+)`` grows with the square of the sentence's length.
_LONGEST_STATEMENT = 300
_STATEMENTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (r"your name is (.+)", ("What is your name?",), r"My name is \1."),
    (r"you are called (.+)", ("What is your name?",), r"My name is \1."),
    (r"(?:you were made by (.+)|(.+) made you)", ("Who made you?",), r"I was made by \1\2."),
    (r"my name is (.+)", ("What is my name?", "Who am I?"), r"Your name is \1."),
    (r"i live (in|at|on) (.+)", ("Where do I live?",), r"You live \1 \2."),
    (r"i am (\d+) years old", ("How old am I?",), r"You are \1 years old."),
    (
        r"(?:my|our) (.+?) (is|are|was|were) (?:called|named) (.+)",
        (r"What \2 my \1 called?",),
        r"Your \1 \2 called \3.",
    ),
    (r"(?:my|our) (.+?) (is|are|was|were) (.+)", (r"What \2 my \1?",), r"Your \1 \2 \3."),
    (r"(.+?) (lives|works) (in|at|on|with) (.+)", (r"Where does \1 \2?",), r"\1 \2 \3 \4."),
    (r"(.+?) was born (in|on) (.+)", (r"When was \1 born?",), r"\1 was born \2 \3."),
    (r"the (.+?) of (.+?) (is|are|was|were) (.+)", (r"What \3 the \1 of \2?",), r"The \1 of \2 \3 \4."),
    (r"(.+?(?:'s|’s) .+?) (is|are|was|were) (.+)", (r"What \2 \1?",), r"\1 \2 \3."),
    (
        r"([A-Z]\S*(?: [A-Z]\S*)*) (is|are|was|were) (.+)",
        (r"Who \2 \1?", r"What \2 \1?", r"Tell me about \1."),
        r"\1 \2 \3.",
    ),
    (r"(the [\w -]+?) (is|are|was|were) (.+)", (r"What \2 \1?", r"Tell me about \1."), r"\1 \2 \3."),
)


@dataclasses.dataclass(frozen=True)
class Wordings:
    """The wordings of one question.

    Attributes:
        plain: the question as it is written, further wordings that a person wrote, questions that ask an assistant the
            same thing, and rewrites, for training.
        framed: other sentences that contain a wording of ``plain``, for training.
        held_out: rewrites, framed wordings and questions that ask an assistant the same thing, which training does not
            show.
    """

    plain: tuple[str, ...]
    framed: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.plain, *self.framed, *self.held_out)

    def draw(self, rng: random.Random) -> str:
        """Draw a wording for training: one of ``plain`` or ``framed``, sometimes changed to look casually typed."""
        question = rng.choice(self.plain if rng.random() < 0.55 or not self.framed else self.framed)
        chance = rng.random()
        if chance < 0.12:
            return question.lower().rstrip("?.!")
        if chance < 0.18:
            return question.rstrip("?.!")
        if chance < 0.28 and " " in (short := keywords(question)):
            return short
        return _disturbed(question, rng) if chance < 0.45 else question


def wordings(question: str, given: Sequence[str] = ()) -> Wordings:
    """The wordings of a question. ``given`` are wordings that a person wrote; none of these is held out."""
    question = question.strip()
    plain, held_out = [question, *(each.strip() for each in given)], list[str]()
    known = {normal(each) for each in plain}
    for train, kept in _INTENTS:
        if known & {normal(each) for each in (*train, *kept)}:
            plain += train
            held_out += kept
    rewritten = rewrites(question)
    held_out += rewritten[2::3]
    plain += [each for i, each in enumerate(rewritten) if i % 3 != 2]
    plain = _distinct(plain, [])
    framed = [frame for each in plain for frame in _framed(each, _CLAUSE_FRAMES, _COMMAND_FRAMES, _QUESTION_FRAMES)]
    held_out += _framed(question, _HELD_OUT_CLAUSE_FRAMES, _HELD_OUT_COMMAND_FRAMES, _HELD_OUT_QUESTION_FRAMES)
    framed = _distinct(framed, plain)
    return Wordings(tuple(plain), tuple(framed), tuple(_distinct(held_out, [*plain, *framed])))


def is_intent(question: str, intent: int) -> bool:
    """Whether a question is in the set of ``_INTENTS`` with the index ``intent``, such as :data:`NAME_INTENT`."""
    return normal(question) in {normal(each) for part in _INTENTS[intent] for each in part}


def rewrites(question: str) -> list[str]:
    """Rewrites of the question by every rule that applies; empty if the text does not end with a question mark."""
    if not question.endswith("?"):
        return []
    asked = re.sub(r"^(what|who|where|when)['’]s\b", r"\1 is", question.rstrip("? "), flags=re.IGNORECASE)
    found: list[str] = []
    for pattern, others in _REWRITES:
        if match := re.fullmatch(pattern, asked, re.IGNORECASE):
            found += [match.expand(other) for other in others]
    for word, other in _SYNONYMS:
        found += [
            re.sub(rf"\b{word}\b", other, each) for each in (asked, *found[:2]) if re.search(rf"\b{word}\b", each)
        ]
    return _distinct([_capital(re.sub(r"\bi\b", "I", each)) + "?" for each in found], [question])


def clause(question: str) -> str | None:
    """The question as a clause of another sentence: "Where is Anna?" gives "where Anna is". None if no rule applies."""
    if not question.endswith("?"):
        return None
    asked = _small(re.sub(r"^(what|who|where|when)['’]s\b", r"\1 is", question.rstrip("? "), flags=re.IGNORECASE))
    if match := re.fullmatch(
        r"((?:what|who|whom|whose|where|when|which|how|why)\b(?: [\w'’-]+){0,3}?) (is|are|was|were|am) (.+)", asked
    ):
        if match[3].startswith("there "):
            return f"{match[1]} there {match[2]} {match[3].removeprefix('there ')}"
        return f"{match[1]} {match[3]} {match[2]}"
    if match := re.fullmatch(
        r"(.*?\b(?:what|who|whose|where|when|which|how|why)\b.*?) do (i|you|we|they) (.+)", asked, re.IGNORECASE
    ):
        return f"{match[1]} {match[2]} {match[3]}"
    if match := re.fullmatch(r"(.*?\b(?:what|who|whose|where|when|which|how|why)\b.*?) does (.+) (\w+)( best)?", asked):
        verb = {"have": "has", "do": "does", "go": "goes"}.get(
            match[3], match[3] + ("es" if match[3].endswith(("s", "ch", "sh")) else "s")
        )
        return f"{match[1]} {match[2]} {verb}{match[4] or ''}"
    if re.fullmatch(r"who (?!(?:do|does|did|am)\b)\w+ .+", asked):
        return asked
    return None


def keywords(question: str) -> str:
    """The words of a question that carry its meaning, in lower case; all its words if none carries meaning."""
    words = normal(question).split()
    return " ".join(word for word in words if not _FUNCTION_WORD.fullmatch(word)) or " ".join(words)


def _disturbed(question: str, rng: random.Random) -> str:
    """The question with its first part moved to its end, or without one word that carries no meaning.

    Its last punctuation may be left out too. A question without such a word may keep its words. A word that carries
    meaning is never left out, because the remaining words could be another question.
    """
    said = question.rstrip("?.! ")
    words = said.split()
    if len(words) > 4 and rng.random() < 0.5:
        cut = rng.randrange(1, len(words))
        words = [*words[cut:], _small(words[0]), *words[1:cut]]
    elif empty := [i for i, word in enumerate(words) if _FUNCTION_WORD.fullmatch(word.lower())]:
        words.pop(rng.choice(empty))
    return " ".join(words) + (question[len(said) :] if rng.random() < 0.8 else "")


def statement_questions(text: str) -> list[tuple[tuple[str, ...], str]]:
    """The questions that sentences of a text answer, as pairs of the question's wordings and its answer.

    Only sentences of a few simple forms give questions, such as "Anna lives in Bergen."
    """
    found = []
    for sentence in re.split(r"(?<=[.!])\s+", text):
        said = sentence.strip().rstrip(".!")
        if len(said) >= _LONGEST_STATEMENT:
            continue
        for pattern, questions, answer in _STATEMENTS:
            match = re.fullmatch(pattern, said, re.IGNORECASE if not pattern.startswith(r"([A-Z]") else 0)
            if match:
                said_so = _capital(match.expand(answer))
                asked = [re.sub(r" (live|work)s\?", r" \1?", match.expand(each)) for each in questions]
                asked = [re.sub(r"(?<=\w )The ", "the ", each) for each in asked]
                found.append((tuple(asked), said_so))
                break
    return found


def with_statements(items: Sequence[Item]) -> list[Item]:
    """The items, and a new item for each question that a sentence of an item's text answers and that no item asks.

    :func:`statement_questions` finds these questions.
    """
    asked = {normal(item.question) for item in items if item.alone}
    found = list(items)
    for item in items:
        for questions, answer in statement_questions(item.text):
            if normal(questions[0]) not in asked:
                asked.add(normal(questions[0]))
                found.append(Item.of(questions[0], answer, questions[1:]))
    return found


def _framed(
    question: str, clause_frames: Sequence[str], command_frames: Sequence[str], question_frames: Sequence[str]
) -> list[str]:
    """Sentences that contain the question.

    ``command_frames`` are used only if the question is a command that ends with a full stop.
    """
    small = _small(question)
    framed = [frame.format(question=question, small=small) for frame in question_frames]
    if (within := clause(question)) is not None:
        framed += [frame.format(clause=within) for frame in clause_frames]
    if question.endswith(".") and question.count(".") == 1:
        command = (small if small != question else question[:1].lower() + question[1:]).rstrip(".")
        framed += [frame.format(small=command) for frame in command_frames]
    return framed


def _distinct(questions: Sequence[str], others: Sequence[str]) -> list[str]:
    """The questions without repetitions and without the members of ``others``.

    Two questions count as the same if :func:`normal` returns the same text for both.
    """
    known = {normal(each) for each in others}
    kept = []
    for each in questions:
        if normal(each) not in known:
            known.add(normal(each))
            kept.append(each)
    return kept


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _small(text: str) -> str:
    first = re.match(r"\w*", text)
    return text[:1].lower() + text[1:] if first and _START.fullmatch(first[0].lower()) else text
