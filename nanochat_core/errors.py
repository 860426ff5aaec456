"""Errors that a user can cause, and how a program ends after one."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """The user's input is wrong. The message says what is wrong and what to do.

    Programs print the message as one line, without a traceback, and exit with :attr:`exit_code`.
    """

    exit_code = 2


class RetryableError(UserError):
    """Something outside of the program failed, and another attempt may succeed. The work done so far is kept.

    Job controllers restart a program that ends with this exit code, just as they restart a program that a signal ended.
    """

    exit_code = 138


def run_main(main: Callable[[], int | None], program: str) -> None:
    """Runs ``main`` and exits with the code that it returns. A :class:`UserError` becomes one line on stderr."""
    try:
        code = main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)
