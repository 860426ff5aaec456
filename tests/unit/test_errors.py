"""A program that ends because of a user's error prints one line. After any other error, it prints a traceback."""

import subprocess
import sys

import pytest

from nanochat_core.errors import UserError, run_main


def ended(body: str) -> subprocess.CompletedProcess[str]:
    code = f"""
import signal, os
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets its background jobs ignore the signal
from nanochat_core.errors import RetryableError, UserError, run_main
def main():
    {body}
run_main(main, "python -m example")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_a_user_error_is_one_line_and_exit_code_2() -> None:
    done = ended("raise UserError('--port is 99999; it must be at most 65535')")
    assert done.returncode == 2
    assert done.stderr == "python -m example: error: --port is 99999; it must be at most 65535\n"
    assert done.stdout == ""


def test_names_with_line_breaks_and_escapes_stay_in_one_line() -> None:
    done = ended(r"raise UserError('a\nb\x1b[31m\udcff\u2028\xe9.txt is damaged')")
    assert done.stderr == "python -m example: error: a\\nb\\x1b[31m\\udcff\\u2028\xe9.txt is damaged\n"


@pytest.mark.parametrize("body", ["bytearray(1 << 60)", 'raise RuntimeError("can\'t allocate memory: you tried 9")'])
def test_a_lack_of_memory_is_one_line(body: str) -> None:
    done = ended(body)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m example: error: there is not enough memory: ")
    assert len(done.stderr.splitlines()) == 1


def test_what_may_go_better_next_time_has_a_code_that_job_controllers_restart_on() -> None:
    done = ended("raise RetryableError('the store was gone for too long')")
    assert done.returncode == 138
    assert done.stderr == "python -m example: error: the store was gone for too long\n"


def test_any_other_error_keeps_its_traceback() -> None:
    done = ended("raise RuntimeError('a bug')")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: a bug" in done.stderr


def test_an_interrupt_ends_quietly() -> None:
    done = ended("os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)")
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_the_returned_number_is_the_exit_code(returned: int | None, code: int) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(lambda: returned, "example")
    assert exit_.value.code == code


def test_a_program_that_ends_itself_keeps_its_exit_code() -> None:
    def stopped_by_signal() -> int:
        raise SystemExit(143)

    with pytest.raises(SystemExit) as exit_:
        run_main(stopped_by_signal, "example")
    assert exit_.value.code == 143


def test_a_subclass_counts_as_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    class Special(UserError):
        pass

    def fail() -> int:
        raise Special("this one too")

    with pytest.raises(SystemExit) as exit_:
        run_main(fail, "example")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "example: error: this one too\n"
