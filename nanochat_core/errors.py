"""Errors that a user can cause, and how a program ends after such an error."""

import sys
from collections.abc import Callable

# Exit code if the promotion gate, which decides whether a model may be served, refuses a model. The gate itself, a
# training pipeline and a program that teaches lessons exit with this code. The code 2 is taken: it means a wrong
# setting. Codes of 128 or more are not used here, because Kubernetes restarts jobs that end with some of them.
EXIT_REFUSED = 3
# Exit code of a lesson that failed for another reason than the gate's decision. For example, an answer in the lesson's
# file may be too long for the model.
EXIT_FAILED = 4
# Exit code of a lesson that somebody canceled. The code 1 is not used here, because Python exits with 1 after a crash.
EXIT_CANCELED = 5

# The texts of the RuntimeErrors by which the CPU's allocator, CUDA, cuBLAS and cuDNN report a lack of memory.
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")


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
    """Runs ``main`` and exits with the code that it returns.

    A :class:`UserError` or a lack of memory becomes one line on stderr. Ctrl-C ends the program with the code 130.
    """
    try:
        code = main()
    except UserError as error:
        print(f"{program}: error: {_one_line(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"{program}: error: there is not enough memory: {_one_line(str(error))[:300]}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine had too little free memory.

    After such an error the program can continue. A smaller request may succeed, and so may the same request later.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def _one_line(message: str) -> str:
    """The message in one line. Escape sequences replace line breaks and other control characters."""
    return "".join(
        char if char.isprintable() or char == " " else char.encode("unicode_escape").decode() for char in message
    )
