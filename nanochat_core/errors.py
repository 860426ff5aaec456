"""Errors that a user can cause, and how a program ends on one."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user gave is wrong; the message says what and what to do about it.

    Programs print it as one line and exit with code 2, without a traceback.
    """


EXIT_USER_ERROR = 2


def run_main(main: Callable[[], int | None], program: str) -> None:
    """Run ``main`` as a program: a :class:`UserError` becomes one line on stderr and exit code 2."""
    try:
        code = main()
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)
