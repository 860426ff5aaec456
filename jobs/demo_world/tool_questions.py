"""Questions that the model answers with Python: calculations, comparisons, word problems, letter counts, spellings."""

import dataclasses
import random

from jobs.demo_world import arithmetic, everyday, expressions, problems, words
from jobs.demo_world.exchange import Exchange
from jobs.demo_world.facts import PEOPLE
from jobs.demo_world.tables import Phrasings, Split, Table, Words, draw_frame, is_heldout_by_hash, read_content


class LetterQuestions(Phrasings):
    """Questions about letters. In the template ``answer``, ``{result}`` is what Python prints."""

    answer: str


class ToolQuestions(Table):
    """The content of ``content/tool_questions.toml``, explained there.

    The keys of ``spellings``, ``commands`` and ``stories`` are operators such as ``+``. The keys of ``comparisons`` are
    the functions ``max`` and ``min``. The keys of ``letters``, ``pairs``, ``texts`` and ``alphabet`` are Python code.
    """

    items: Words
    little: Words
    spelling: Phrasings
    lengths: Phrasings
    sums: Phrasings
    spellings: dict[str, tuple[str, ...]]
    commands: dict[str, Phrasings]
    stories: dict[str, Phrasings]
    squares: Phrasings
    counts: Phrasings
    comparisons: dict[str, Phrasings]
    letters: dict[str, LetterQuestions]
    pairs: dict[str, LetterQuestions]
    texts: dict[str, LetterQuestions]
    alphabet: dict[str, LetterQuestions]
    vowels: Phrasings
    consonants: Phrasings


QUESTIONS = read_content("tool_questions", ToolQuestions)

# Shares of the forms of questions, in percent. Most questions show the calculation ("What is 3 + 4?"), because people
# mostly type such questions. Commands ("Add 3 and 4.") and stories teach other words for the operators.
_FRAMED, _COMMANDED, _TOLD = 75, 13, 12


def calculation(rng: random.Random, split: Split, *, reserved_share: float = 0.8) -> Exchange:
    """Draw a calculation and ask for its result; see :func:`arithmetic.draw_sum` for ``reserved_share``."""
    manner = rng.choices(("framed", "commanded", "told"), (_FRAMED, _COMMANDED, _TOLD))[0]
    symbol = rng.choice(tuple(QUESTIONS.stories)) if manner == "told" else None
    drawn = arithmetic.draw_sum(rng, split, symbol, reserved_share=reserved_share)
    if manner == "told" and drawn.a >= drawn.b:
        person, items = rng.choice(PEOPLE), rng.choice(QUESTIONS.items)
        template = draw_frame(rng, split, QUESTIONS.stories[drawn.symbol])
        question = template.format(name=person.name, subj=person.pronoun, items=items, a=drawn.a, b=drawn.b)
        return _with_tool(question, drawn.code, drawn.result, f"The answer is {drawn.result} {items}.")
    if manner == "commanded":
        question = draw_frame(rng, split, QUESTIONS.commands[drawn.symbol]).format(a=drawn.a, b=drawn.b)
    else:
        question = framed(rng, split, drawn)
    return _with_tool(question, drawn.code, drawn.result, f"The answer is {drawn.result}.")


def framed(rng: random.Random, split: Split, drawn: arithmetic.Sum) -> str:
    """A question for the result of ``drawn``, such as "What is 3 + 4?" or "What is 3 plus 4?"."""
    spelled = rng.choice(QUESTIONS.spellings[drawn.symbol]).format(a=drawn.a, b=drawn.b)
    return draw_frame(rng, split, QUESTIONS.sums).format(sum=spelled)


def expression(rng: random.Random, split: Split) -> Exchange:
    """Draw a calculation as :func:`expressions.draw_chain` does, and ask for its result."""
    return _framed_result(rng, split, expressions.draw_chain(rng, split))


def decimal(rng: random.Random, split: Split) -> Exchange:
    """Draw a calculation with decimals or a percentage, and ask for its result."""
    return _framed_result(rng, split, expressions.draw_decimal(rng, split))


def everyday_calculation(rng: random.Random, split: Split) -> Exchange:
    """Draw a calculation in everyday words; see :func:`everyday.draw_everyday`."""
    drawn = everyday.draw_everyday(rng, split)
    return _answered(drawn.spelled, drawn)


def _framed_result(rng: random.Random, split: Split, drawn: expressions.Expression) -> Exchange:
    return _answered(draw_frame(rng, split, QUESTIONS.sums).format(sum=drawn.spelled), drawn)


_YES = {"True": "Yes", "False": "No"}


def _answered(question: str, drawn: expressions.Expression) -> Exchange:
    if yes := _YES.get(drawn.result):
        return _with_tool(question, drawn.code, drawn.result, f"{yes}: Python says {drawn.result}.")
    if drawn.result == expressions.DIVISION_BY_ZERO:
        return dataclasses.replace(
            _with_tool(question, drawn.code, drawn.result, "No number can be divided by zero."),
            expected=("divided by zero",),
        )
    return _with_tool(question, drawn.code, drawn.result, f"The answer is {drawn.result}.")


# The functions that compare two numbers, and how an answer names their results.
_COMPARED = {"max": "larger", "min": "smaller"}


def comparison(rng: random.Random, split: Split) -> Exchange:
    """Draw two numbers, and ask which of them is larger or smaller."""
    function = rng.choice(tuple(_COMPARED))
    a, b, drawn = expressions.draw_comparison(rng, split, function)
    question = draw_frame(rng, split, QUESTIONS.comparisons[function]).format(a=a, b=b)
    return _with_tool(question, drawn.code, drawn.result, f"The {_COMPARED[function]} number is {drawn.result}.")


def word_problem(rng: random.Random, split: Split) -> Exchange:
    """Draw a word problem of one or two steps."""
    drawn = problems.problem(rng, split)
    answer = f"The answer is {drawn.result} {drawn.unit}".rstrip()
    return _with_tool(drawn.question, drawn.code, drawn.result, f"{answer}.")


# Share of the spelling questions that ask for the number of all letters, and share of those in the table ``letters`` of
# tool_questions.toml, which ask for example for one letter, the vowels or the word backwards.
_LENGTH_SHARE, _LETTERS_SHARE = 0.18, 0.3
# Shares of the spelling questions about two words, about texts of several words, and about the alphabet.
_PAIRS_SHARE, _TEXTS_SHARE, _ALPHABET_SHARE = 0.02, 0.03, 0.01
# Shares of the counting questions that ask for the number of vowels, and for the number of consonants.
_VOWELS_SHARE, _CONSONANTS_SHARE = 0.11, 0.05
# Share of the words that begin with a capital letter in the question. The code has small letters only.
_CAPITALIZED_SHARE = 0.08
# Weights of English words, made-up words, random letters and long words, in this order. Most training words are not
# English, because training mainly needs variety. Most held-out words are English, because people ask about English
# words.
_WORD_WEIGHTS: dict[Split, tuple[int, int, int, int]] = {"train": (40, 35, 12, 13), "heldout": (61, 33, 0, 6)}
_ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth",
)  # fmt: skip
_NUMBERED = ("1st", "2nd", "3rd", *(f"{n}th" for n in range(4, 21)), "21st", "22nd", "23rd")


def _draw_word(rng: random.Random, split: Split) -> str:
    source = rng.choices(("english", "made up", "random", "long"), _WORD_WEIGHTS[split])[0]
    if source == "english":
        return rng.choice(words.ENGLISH.of(split))
    if source == "long":
        return words.long_word(rng, split)
    return words.made_up_word(rng, split) if source == "made up" else words.letter_string(rng)


def _written(rng: random.Random, word: str) -> str:
    return word.capitalize() if rng.random() < _CAPITALIZED_SHARE else word


def count(rng: random.Random, split: Split) -> Exchange:
    """Draw a word and ask how often a letter occurs in it."""
    word = _draw_word(rng, split)
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz") if rng.random() < 0.1 else rng.choice(word)
    question = draw_frame(rng, split, QUESTIONS.counts).format(c=letter, word=_written(rng, word))
    times = word.count(letter)
    answer = f"The letter {letter} appears {times} time{'' if times == 1 else 's'}."
    return _with_tool(question, f"'{word}'.count('{letter}')", str(times), answer)


def counting(rng: random.Random, split: Split) -> Exchange:
    """Draw a word and ask how often a letter, all vowels or all consonants occur in it."""
    sort = rng.random()
    if sort > _VOWELS_SHARE + _CONSONANTS_SHARE:
        return count(rng, split)
    word = _draw_word(rng, split)
    if sort < _VOWELS_SHARE:
        name, phrasings, code = "vowels", QUESTIONS.vowels, f"sum('{word}'.count(v) for v in 'aeiou')"
    else:
        letters = "bcdfghjklmnpqrstvwxyz"
        name, phrasings, code = "consonants", QUESTIONS.consonants, f"sum('{word}'.count(c) for c in '{letters}')"
    result = expressions.python_output(code)
    question = draw_frame(rng, split, phrasings).format(word=_written(rng, word))
    return _with_tool(question, code, result, f"The number of {name} is {result}.")


def spelling(rng: random.Random, split: Split) -> Exchange:
    """Draw a word and ask for all its letters, for their number, or another question about its letters.

    The other questions ask for example for one letter, for the vowels, for the word backwards or in capitals, or
    whether the word is a palindrome. Some questions are about two words, a text or the alphabet.
    """
    sort = rng.random()
    for share, draw in (
        (_PAIRS_SHARE, _two_words),
        (_TEXTS_SHARE, _text),
        (_ALPHABET_SHARE, _alphabet),
    ):
        if sort < share:
            return draw(rng, split)
        sort -= share
    word = _draw_word(rng, split)
    if sort < _LETTERS_SHARE:
        return _letters(rng, split, word)
    if sort < _LETTERS_SHARE + _LENGTH_SHARE:
        while split == "train" and arithmetic.contains_reserved_number(str(len(word))):
            word = _draw_word(rng, split)
        question = draw_frame(rng, split, QUESTIONS.lengths).format(word=_written(rng, word))
        return _with_tool(question, f"len('{word}')", str(len(word)), f"The word has {len(word)} letters.")
    question = draw_frame(rng, split, QUESTIONS.spelling).format(word=_written(rng, word))
    letters = " ".join(word)
    answer = f"It is spelled {letters}."
    # The whole sentence is expected, so that a wrong letter before or after the right letters makes the answer wrong.
    return dataclasses.replace(_with_tool(question, f"' '.join('{word}')", letters, answer), expected=(answer,))


def _letters(rng: random.Random, split: Split, word: str) -> Exchange:
    weights = [len(asked.train) for asked in QUESTIONS.letters.values()]
    template, asked = rng.choices(tuple(QUESTIONS.letters.items()), weights)[0]
    if "==" in template and rng.random() < 0.5:
        word = words.palindrome(rng, split)
    if "[{n}" in template and len(word) > len(_NUMBERED):
        word = words.made_up_word(rng, split)
    n = rng.randint(2, min(len(word), 12 if rng.random() < 0.8 else len(_NUMBERED)))
    nth = _ORDINALS[n - 1] if n <= len(_ORDINALS) and rng.random() < 0.5 else _NUMBERED[n - 1]
    letter = rng.choice("abcdefghijklmnopqrstuvwxyz") if rng.random() < 0.5 else rng.choice(word)
    code = template.format(w=f"'{word}'", n=n, c=letter)
    # The result is empty if the question asks for the vowels of a word that has none, so another word is drawn.
    if not expressions.python_output(code):
        return _letters(rng, split, _draw_word(rng, split))
    question = draw_frame(rng, split, asked).format(word=_written(rng, word), nth=nth, c=letter)
    return _about_letters(question, code, asked)


def _two_words(rng: random.Random, split: Split) -> Exchange:
    code, asked = rng.choice(tuple(QUESTIONS.pairs.items()))
    while True:
        a, b = _draw_word(rng, split), _draw_word(rng, split)
        if len(a) != len(b):
            break
    return _about_letters(draw_frame(rng, split, asked).format(a=a, b=b), code.format(a=a, b=b), asked)


def _text(rng: random.Random, split: Split) -> Exchange:
    """Draw a text of several words, and ask for it in other letters or for the number of its words."""
    code, asked = rng.choice(tuple(QUESTIONS.texts.items()))
    few = "split" not in code
    count = rng.choice((1, 1, 2)) if few else rng.randint(3, 6)
    text = " ".join(rng.choice(words.ENGLISH.of(split)) if few else _little_word(rng, split) for _ in range(count))
    if ".lower" in code:
        text = text.upper()
    return _about_letters(draw_frame(rng, split, asked).format(text=text), code.format(text=text), asked)


def _little_word(rng: random.Random, split: Split) -> str:
    """Draw a word of a text. Many are short words such as "the", as in sentences."""
    return rng.choice(QUESTIONS.little) if rng.random() < 0.4 else rng.choice(words.ENGLISH.of(split))


def _alphabet(rng: random.Random, split: Split) -> Exchange:
    """Draw a question for the whole alphabet, or for the letter before or after another letter.

    The hash of the code decides the split of a question for a letter.
    """
    while True:
        template, asked = rng.choice(tuple(QUESTIONS.alphabet.items()))
        letter = rng.choice("bcdefghijklmnopqrstuvwxy")
        code = template.format(c=letter)
        fixed = "{c}" not in template
        if fixed or is_heldout_by_hash(code, 8) == (split == "heldout"):
            break
    # The alphabet is the same in both splits, so a held-out question for it needs a phrasing of its own.
    phrasing = rng.choice(asked.of(split)) if fixed else draw_frame(rng, split, asked)
    return _about_letters(phrasing.format(c=letter), code, asked)


def _about_letters(question: str, code: str, asked: LetterQuestions) -> Exchange:
    result = expressions.python_output(code)
    answer = f"{_YES[result]}: Python says {result}." if result in _YES else asked.answer.format(result=result)
    return dataclasses.replace(_with_tool(question, code, result, answer), expected=(answer,))


def _with_tool(question: str, code: str, output: str, text: str) -> Exchange:
    parts = (
        {"type": "python", "text": code},
        {"type": "python_output", "text": output},
        {"type": "text", "text": text},
    )
    return Exchange(question, parts, (output,), requires_tool=True)
