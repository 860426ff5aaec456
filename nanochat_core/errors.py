"""Errors that a user can cause, and how a program ends on one."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user gave is wrong; the message says what and what to do about it.

    Programs print it as one line and exit with :attr:`exit_code`, without a traceback.
    """

    exit_code = 2


class RetryableError(UserError):
    """Something around the program failed, which may not happen again; what was done so far is kept.

    Its exit code is one on which job controllers start the program again, as on those of signals.
    """

    exit_code = 138


def run_main(main: Callable[[], int | None], program: str) -> None:
    """Run ``main`` as a program: a :class:`UserError` becomes one line on stderr and its exit code."""
    try:
        code = main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)
