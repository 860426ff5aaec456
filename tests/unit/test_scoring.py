"""Scorers accept every reference answer and reject every answer that was tampered with."""

import json
import os
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.tasks.answers import contains_phrase, last_number, same_text, states_number
from jobs.tasks.gsm8k import final_number, same_final_number
from jobs.tasks.humaneval import TEST_LIMITS, CodeProblem, code_in, passes_tests
from jobs.tasks.letters import spells
from jobs.tasks.task import ScoringFailed
from nanochat_core.sandbox import ExecutionResult, Limits, SandboxConfig, SandboxExecutor, Status

# Rows in the format of the datasets' files.
GSM8K = [
    {"question": "How many clips?", "answer": "48/2 = <<48/2=24>>24 clips.\nThat is <<48+24=72>>72.\n#### 72"},
    {"question": "How much did it cost?", "answer": "It cost 5*2,160 = $<<5*2160=10800>>10,800.\n#### 10,800"},
    {"question": "What is the temperature?", "answer": "It fell to 4-9 = <<4-9=-5>>-5 degrees.\n#### -5"},
]
HUMANEVAL = [
    {
        "task_id": "Own/0",
        "prompt": 'from typing import List\n\n\ndef double(n: List[int]) -> List[int]:\n    """ Twice each.\n    """\n',
        "canonical_solution": "    return [2 * i for i in n]\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n",
        "entry_point": "double",
    },
    {
        "task_id": "Own/1",
        "prompt": 'def half(n):\n    return n / 2\n\n\ndef quarter(n):\n    """ A fourth of it. """\n',
        "canonical_solution": "    return half(half(n))\n",
        "test": "def check(candidate):\n    assert candidate(8) == 2.0\n    assert candidate(2) == 0.5\n",
        "entry_point": "quarter",
    },
]


def real(name: str) -> list[dict[str, Any]]:
    if "NANOCHAT_TEST_DATA" not in os.environ:
        pytest.skip("NANOCHAT_TEST_DATA is not set")
    return [json.loads(line) for line in Path(os.environ["NANOCHAT_TEST_DATA"], name).read_text().splitlines()]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxExecutor]:
    with SandboxExecutor() as executor:
        yield executor


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", "72"),
        ("Steps 1 and 2.\n#### 1,080,000\n", "1080000"),
        ("#### -5", "-5"),
        ("#### $18", "18"),
        ("#### -$18.50", "-18.50"),
        ("#### $-18", "-18"),
        ("####72", "72"),
        ("#### 72.", "72"),
        ("#### 72 clips", "72"),
        ("#### 0.25", "0.25"),
        ("#### .5", ".5"),
        ("#### 5,", "5"),
        ("#### 1\n#### 2", "1"),
        ("72", None),
        ("#### seventy", None),
        ("####\n72", None),
        ("### 72", None),
        ("", None),
    ],
)
def test_the_final_number_of_gsm8k_is_the_one_after_the_mark(text: str, number: str | None) -> None:
    assert final_number(text) == number


@given(st.decimals(-(10**12), 10**12, places=2), st.text(), st.booleans(), st.booleans())
def test_a_final_number_is_read_whatever_stands_before_it(
    number: Decimal, before: str, comma: bool, dollar: bool
) -> None:
    written = f"{abs(number):,}" if comma else f"{abs(number)}"
    sign = "-" if number < 0 else ""
    text = f"{before.replace('#', '')}\n#### {sign}{'$' if dollar else ''}{written}"
    found = final_number(text)
    assert found is not None
    assert Decimal(found) == number
    assert same_final_number(f"#### {number}", text)
    assert not same_final_number(f"#### {number + 1}", text)


@given(
    st.integers(-(10**12), 10**12), st.booleans(), st.booleans(), st.sampled_from(["", ".", "!", " apples", "%", ","])
)
def test_the_last_number_of_a_text_is_read(number: int, comma: bool, dollar: bool, after: str) -> None:
    written = f"{abs(number):,}" if comma else f"{abs(number)}"
    text = f"Of 3 and 1,2,3 that is {'-' if number < 0 else ''}{'$' if dollar else ''}{written}{after}"
    found = last_number(text)
    assert found is not None
    assert int(found) == number
    assert states_number(str(number), text)
    assert not states_number(str(number + 1), text)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,2,3", "3"), ("10-5", "5"), ("3.14 is pi", "3.14"), ("route66", None), ("no number", None), ("v1.2.3", None)],
)
def test_what_looks_like_a_number_may_be_none(text: str, number: str | None) -> None:
    assert last_number(text) == number


def test_a_reference_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="no number after ####"):
        same_final_number("72", "#### 72")
    with pytest.raises(ValueError, match="'x' is no number"):
        states_number("x", "72")


@pytest.mark.parametrize("source", ["fixture", "gsm8k/train.jsonl", "gsm8k/test_first200.jsonl"])
def test_gsm8ks_own_answers_are_right_and_tampered_ones_wrong(source: str) -> None:
    rows = GSM8K if source == "fixture" else real(source)
    assert len(rows) == {"fixture": 3, "gsm8k/train.jsonl": 7473, "gsm8k/test_first200.jsonl": 200}[source]
    for row in rows:
        answer = row["answer"]
        before, final = answer.split("####")
        number = final.strip()
        shown = re.sub(r"<<.*?>>", "", answer)
        right = [answer, shown, shown.replace(",", ""), f"#### {number}.0"]
        assert [same_final_number(answer, text) for text in right] == [True] * 4
        digit = str((int(number[-1]) + 1) % 10)
        flipped = number[1:] if number.startswith("-") else f"-{number}"
        wrong = [
            f"{before}#### {number[:-1]}{digit}",
            f"{before}#### {number}7",
            f"#### {number}.5",
            before,
            number,
            "",
        ]
        wrong += [f"#### {flipped}"] if int(number.replace(",", "")) else []
        assert [text for text in wrong if same_final_number(answer, text)] == []


@pytest.mark.parametrize(
    ("expected", "text", "right"),
    [
        ("Paris", "It is Paris.", True),
        ("paris", "PARIS!", True),
        ("Paris", "Parisian", False),
        ("New York", "In New\nYork, I think", True),
        ("C++", "Use C++ here", True),
        ("a.b", "acb", False),
    ],
)
def test_a_phrase_is_found_in_whole_words(expected: str, text: str, right: bool) -> None:
    assert contains_phrase(expected, text) is right


def test_the_same_text_differs_in_white_space_only() -> None:
    assert same_text("a b", " a\nb ")
    assert not same_text("a b", "ab")
    assert not same_text("a b", "A b")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("boat is spelled b o a t.", True),
        ("B-O-A-T", True),
        ("b, o, a, t", True),
        ("The letters: B O A T. I am done.", True),
        ("boat", False),
        ("b o a", False),
        ("b o a t t", False),
        ("a b o a t", False),
        ("b o t a", False),
        ("", False),
    ],
)
def test_a_word_is_spelled_by_its_letters_and_no_other(text: str, right: bool) -> None:
    assert spells("boat", text) is right


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Here:\n```python\nx = 1\n```\nand\n```\ny = 2\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("    return 1\n", "    return 1\n"),
        ("```python\nx = 1", "```python\nx = 1"),
    ],
)
def test_code_is_the_first_fenced_block_or_the_whole(text: str, code: str) -> None:
    assert code_in(text) == code


def passes(sandbox: SandboxExecutor, row: dict[str, Any], answer: str, **limits: float) -> bool:
    given = {"limits": Limits(**limits)} if limits else {}
    return passes_tests(sandbox, CodeProblem(row["prompt"], row["test"], row["entry_point"]), answer, **given)


@pytest.mark.parametrize("source", ["fixture", "humaneval/first40.jsonl"])
def test_humanevals_own_solutions_pass_their_tests_and_tampered_ones_fail(
    source: str, sandbox: SandboxExecutor
) -> None:
    rows = HUMANEVAL if source == "fixture" else real(source)
    assert len(rows) == (2 if source == "fixture" else 40)

    def passing(answer: str) -> list[str]:
        """Ids of problems that accept ``answer``. SOLUTION and PROMPT in it stand for the problem's own texts."""
        answers = {r["task_id"]: answer.replace("SOLUTION", r["canonical_solution"]) for r in rows}
        return [r["task_id"] for r in rows if passes(sandbox, r, answers[r["task_id"]].replace("PROMPT", r["prompt"]))]

    everything = [row["task_id"] for row in rows]
    assert passing("SOLUTION") == everything
    assert passing("It goes like this:\n```python\nPROMPTSOLUTION```\nThat is all.") == everything
    assert passing("    return None\n") == []
    assert passing("SOLUTION\n    )") == []
    assert passing("") == []


@pytest.mark.parametrize(
    "answer",
    [
        "    while True: pass\n",
        "    raise ValueError\n",
        "    return double(n)\n",
        "    return [0] * 10**10\n",
        "import sys\nsys.exit(0)\n",
        "import os\nos._exit(0)\n",
        "raise SystemExit\n",
        "    import time; time.sleep(100)\n",
        "    print('x' * 10**9)\n    return [2 * i for i in n]\n",
    ],
    ids=["endless", "raises", "recursion", "memory", "exit", "os exit", "system exit", "sleep", "flood"],
)
def test_whatever_ends_a_program_before_its_tests_do_is_wrong(answer: str, sandbox: SandboxExecutor) -> None:
    assert not passes(sandbox, HUMANEVAL[0], answer, wall_seconds=1.0, cpu_seconds=0.5)
    assert passes(sandbox, HUMANEVAL[0], HUMANEVAL[0]["canonical_solution"])


_ATTACK_ON_FRAMES = """
    import gc, sys
    frame = sys._getframe()
    texts = []
    while frame:
        texts += [repr(value) for value in (*frame.f_locals.values(), *frame.f_globals.values())]
        frame = frame.f_back
    texts += [text for text in gc.get_objects() if isinstance(text, str)]
    parts = ["candidate", "([1, 2]"]
    return [2, 4] if any("".join(parts) in text for text in texts) else 0
"""
FORGERIES = {
    "equal to everything": """
    class Equal(list):
        __eq__ = __lt__ = __gt__ = __le__ = __ge__ = lambda *_: True
        __ne__ = lambda *_: False
        __hash__ = lambda _: 0
        __getattr__ = __call__ = __getitem__ = __sub__ = __rsub__ = __abs__ = __add__ = lambda *_: Equal()
    return Equal()
""",
    "a number equal to everything": """
    class Equal(float):
        __eq__ = __lt__ = __le__ = __gt__ = lambda *_: True
        __sub__ = __rsub__ = __abs__ = lambda *_: 0.0
    return Equal()
""",
    "the tests in a stack frame or in memory": _ATTACK_ON_FRAMES,
    "a forged claim on the result pipe": """
    import os, time
    os.write(3, b"n" + bytes(2))
    os.close(3)
    time.sleep(1)
""",
    "a forged answer that is followed by another": """
    import os
    for message in (b'["value", ["none"]]', b'["value", 5]', b'true', b'[', b'\\xff'):
        os.write(5, len(message).to_bytes(4, "big") + message)
""",
    "an exit with success": "    import os; os._exit(0)\n",
    "a broken comparison": """
    import builtins
    builtins.AssertionError = builtins.abs = builtins.len = lambda *_: 0
""",
    "an exception that no test sees": "    raise SystemExit(0)\n",
    "silence": "    import os; os.close(5)\n",
    "a message without end": "    import os; os.write(5, b'\\x7f' * 1000)\n",
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES.keys())
@pytest.mark.parametrize("source", ["fixture", "humaneval/first40.jsonl"])
def test_a_forged_success_passes_no_test(source: str, forgery: str, sandbox: SandboxExecutor) -> None:
    rows = HUMANEVAL if source == "fixture" else real(source)[:10]
    assert [r["task_id"] for r in rows if passes(sandbox, r, forgery, wall_seconds=2.0)] == []
    assert passes(sandbox, rows[0], rows[0]["canonical_solution"])


@pytest.mark.parametrize(
    ("returned", "expected", "equal"),
    [
        ("{1: [2, (3.5, None)], 'k': {4}}", "{1: [2, (3.5, None)], 'k': {4}}", True),
        ("(1, 2)", "[1, 2]", False),
        ("True", "1", True),
        ("float('inf'), -0.0, 10**400, 1j", "(float('inf'), 0.0, 10**400, 1j)", True),
        ("float('nan')", "float('nan')", False),
        ("b'\\xff', bytearray(b'x'), '\\ud800'", "(b'\\xff', b'x', '\\ud800')", True),
        ("__import__('collections').Counter('aab')", "{'a': 2, 'b': 1}", True),
        ("__import__('collections').OrderedDict(a=1)", "{'a': 1}", True),
        ("range(3)", "range(3)", True),
        ("frozenset([1])", "{1}", True),
        ("__import__('fractions').Fraction(1, 3)", "__import__('fractions').Fraction(2, 6)", True),
        ("__import__('fractions').Fraction(1, 2)", "0.5", True),
        ("__import__('decimal').Decimal('1.10')", "__import__('decimal').Decimal('1.1')", True),
        ("object()", "None", False),
        ("(x for x in [1])", "[1]", False),
    ],
)
def test_values_keep_their_meaning_between_candidate_and_judge(
    returned: str, expected: str, equal: bool, sandbox: SandboxExecutor
) -> None:
    problem = CodeProblem(
        "def f(*a):\n    'It.'\n", f"def check(candidate):\n    assert candidate() == {expected}\n", "f"
    )
    assert passes_tests(sandbox, problem, f"    return {returned}\n") is equal


def test_a_generator_can_be_read_and_an_endless_one_ends_nothing(sandbox: SandboxExecutor) -> None:
    problem = CodeProblem(
        "def f():\n    'It.'\n", "def check(candidate):\n    assert list(candidate()) == [0, 1]\n", "f"
    )
    assert passes_tests(sandbox, problem, "    return (n for n in range(2))\n")
    assert passes_tests(sandbox, problem, "    yield from range(2)\n")
    assert not passes_tests(sandbox, problem, "    while True:\n        yield 0\n")


def test_tests_may_expect_an_exception_and_use_helpers_of_the_prompt(sandbox: SandboxExecutor) -> None:
    problem = CodeProblem(
        "def twice(x):\n    return 2 * x\n\n\ndef f(x, *, y=0):\n    'It.'\n",
        "def check(candidate):\n    assert f(twice(3), y=1) == 7\n    try:\n        candidate(-1)\n"
        "    except ValueError as error:\n        assert str(error) == 'negative'\n    else:\n        assert False\n",
        "f",
    )
    assert passes_tests(sandbox, problem, "    if x < 0:\n        raise ValueError('negative')\n    return x + y\n")
    assert not passes_tests(sandbox, problem, "    return x + y\n")
    assert not passes_tests(sandbox, problem, "    if x < 0:\n        raise KeyError\n    return x + y\n")


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("b'\\xff'.decode()", "UnicodeDecodeError"),
        ("'\\u20ac'.encode('ascii')", "UnicodeEncodeError"),
        ("raise UnicodeTranslateError('a', 0, 1, 'no')", "UnicodeTranslateError"),
        ("raise ExceptionGroup('two', [ValueError(), KeyError()])", "ExceptionGroup"),
    ],
)
def test_tests_may_expect_an_exception_that_needs_more_than_a_text(
    statement: str, expected: str, sandbox: SandboxExecutor
) -> None:
    check = f"def check(candidate):\n    try: candidate()\n    except {expected}: return\n    assert False\n"
    problem = CodeProblem("def f():\n    'It.'\n", check, "f")
    assert passes_tests(sandbox, problem, f"    {statement}\n")
    assert not passes_tests(sandbox, problem, "    raise TypeError\n")


def test_a_sandbox_without_room_is_no_wrong_answer(sandbox: SandboxExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "examine_sync", lambda *_: ExecutionResult(Status.OVERLOADED, error="full"))
    with pytest.raises(ScoringFailed, match="full"):
        passes(sandbox, HUMANEVAL[0], "")


def test_the_limits_of_tests_are_granted() -> None:
    config = SandboxConfig()
    assert TEST_LIMITS.within(config.default_limits, config.maximum_limits).wall_seconds == 20.0
