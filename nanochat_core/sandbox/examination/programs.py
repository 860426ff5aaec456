"""The programs of an examination: the candidate, which has the code under test, and the judge, which has the tests."""

from pathlib import Path

_EXCHANGE = (Path(__file__).parent / "exchange.py").read_text()


def candidate_program(code: str, function: str) -> str:
    """A program that runs ``code``, which defines ``function``, and answers the judge's calls of this function."""
    return _program("answer_calls", code, function)


def judge_program(context: str, tests: str, function: str) -> str:
    """A program that runs ``tests`` on the candidate's ``function``. It ends without an error if the tests pass.

    ``tests`` define a function ``check(candidate)``. They may use the names that ``context`` defines.
    """
    return _program("examine", context, tests, function)


def _program(entry: str, *arguments: str) -> str:
    """A program that runs exchange.py in a separate module, and then calls the function ``entry`` of this module."""
    return (
        "import types\n"
        "exchange = types.ModuleType('exchange')\n"
        f"exec({_EXCHANGE!r}, exchange.__dict__)\n"
        f"exchange.{entry}{arguments!r}\n"
    )
