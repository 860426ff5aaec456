"""Calls get the right answers under every isolation profile that works on this machine."""

from collections.abc import Iterator

import pytest

from nanochat_core.sandbox import Limits, ResultFormat, SandboxConfig, SandboxExecutor, SandboxUnavailable, Status


@pytest.fixture(scope="module", params=["bwrap", "pod"])
def executor(request: pytest.FixtureRequest) -> Iterator[SandboxExecutor]:
    try:
        config = SandboxConfig(profile=request.param, concurrency=2, wall_seconds=20, cpu_seconds=10)
        started = SandboxExecutor(config).start()
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    yield started
    started.close()


@pytest.mark.parametrize(
    ("code", "as_str", "as_repr"),
    [
        ("12/60", "0.2", "0.2"),
        ("'strawberry'.count('r')", "3", "3"),
        ("1234 * 5678", "7006652", "7006652"),
        ("'text'", "text", "'text'"),
        ("x = 6\nx * 7", "42", "42"),
        ("print('shown')", None, None),
        ("x = 5", None, None),
        ("None", None, None),
        ("", None, None),
        ("# only a comment", None, None),
        ("'é' * 3", "ééé", "'ééé'"),
        ("1; 2; 3", "3", "3"),
        ("def f(n): return n if n < 2 else f(n-1) + f(n-2)\nf(15)", "610", "610"),
        ("\n\n  \n5", "5", "5"),
        ("0", "0", "0"),
        ("''", "", "''"),
    ],
)
def test_the_value_of_a_trailing_expression_is_the_result(
    executor: SandboxExecutor, code: str, as_str: str | None, as_repr: str | None
) -> None:
    for text_format, expected in ((ResultFormat.STR, as_str), (ResultFormat.REPR, as_repr)):
        result = executor.execute_sync(code, result_format=text_format)
        assert (result.status, result.result, result.error) == (Status.OK, expected, "")
        assert result.profile == executor.profile


def test_output_and_result_are_apart(executor: SandboxExecutor) -> None:
    result = executor.execute_sync("import sys\nprint('out')\nprint('err', file=sys.stderr)\n'value'")
    assert (result.stdout, result.stderr, result.result) == ("out\n", "err\n", "'value'")
    assert not result.truncated


def test_an_exception_is_an_error_with_a_traceback_of_the_code_alone(executor: SandboxExecutor) -> None:
    result = executor.execute_sync("print('before')\ndef half(x):\n  return x / 0\nhalf(1)")
    assert result.status is Status.ERROR
    assert result.error == "ZeroDivisionError: division by zero"
    assert result.stdout == "before\n"
    assert 'File "<code>", line 4' in result.stderr
    assert 'File "<code>", line 3, in half' in result.stderr
    assert "runner.py" not in result.stderr


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("import numpy", "ModuleNotFoundError"),
        ("import nanochat_core", "ModuleNotFoundError"),
        ("raise ValueError('first\\nsecond')", "ValueError: first second"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("raise SystemExit('done')", "SystemExit: done"),
        ("input()", "EOFError"),
        ("return 5", "SyntaxError: 'return' outside function"),
    ],
)
def test_the_error_is_one_line_that_says_what_went_wrong(executor: SandboxExecutor, code: str, error: str) -> None:
    result = executor.execute_sync(code)
    assert result.status is Status.ERROR
    assert result.error.startswith(error)
    assert "\n" not in result.error


def test_a_timeout_names_its_limit_and_keeps_what_was_printed(executor: SandboxExecutor) -> None:
    result = executor.execute_sync("print('so far', end='')\nimport time\ntime.sleep(60)", Limits(wall_seconds=0.3))
    assert (result.status, result.stdout) == (Status.TIMEOUT, "so far")
    assert result.error == "wall time limit of 0.3 s exceeded"
    assert 0.3 <= result.usage.wall_seconds < 5


def test_the_cpu_limit_is_finer_than_a_second(executor: SandboxExecutor) -> None:
    result = executor.execute_sync("while True: pass", Limits(wall_seconds=20, cpu_seconds=0.3))
    assert result.status is Status.TIMEOUT
    assert result.error == "CPU time limit of 0.3 s exceeded"
    assert 0.3 <= result.usage.cpu_seconds < 0.9


def test_memory_is_what_the_code_may_add(executor: SandboxExecutor) -> None:
    limits = Limits(memory_bytes=64 << 20)
    assert executor.execute_sync("len(bytearray(48 << 20))", limits).ok
    result = executor.execute_sync("print('x')\nbytearray(80 << 20)", limits)
    assert (result.status, result.stdout) == (Status.MEMORY, "x\n")
    assert str(64 << 20) in result.error


def test_a_tiny_memory_limit_is_still_answered(executor: SandboxExecutor) -> None:
    assert executor.execute_sync("list(range(10**6))", Limits(memory_bytes=1 << 20)).status is Status.MEMORY
    assert executor.execute_sync("1 + 1", Limits(memory_bytes=1)).result == "2"


@pytest.mark.parametrize(
    ("code", "stream"),
    [
        ("print('é' * 1000)", "stdout"),
        ("import sys\nsys.stderr.write('é' * 1000)", "stderr"),
        ("'é' * 1000", "result"),
    ],
)
def test_cut_output_is_marked(executor: SandboxExecutor, code: str, stream: str) -> None:
    result = executor.execute_sync(code, Limits(output_bytes=101), ResultFormat.STR)
    assert result.status is Status.OUTPUT_LIMIT
    assert result.truncated
    assert result.error == f"{stream} limit of 101 bytes exceeded"
    assert getattr(result, stream) == "é" * 50 + f"\n[{stream} truncated at 101 bytes]"


def test_output_of_exactly_the_limit_is_whole(executor: SandboxExecutor) -> None:
    result = executor.execute_sync("print('x' * 99)\n'y' * 100", Limits(output_bytes=100), ResultFormat.STR)
    assert (result.status, len(result.stdout), len(result.result or ""), result.truncated) == (
        Status.OK,
        100,
        100,
        False,
    )


def test_bytes_that_are_not_text_are_replaced(executor: SandboxExecutor) -> None:
    result = executor.execute_sync(
        "import os\nos.write(1, b'a\\xffb\\0c')\nprint('\\ud800')\n'\\ud800'", result_format=ResultFormat.STR
    )
    assert (result.stdout, result.result) == ("a�b\0c\\ud800\n", "?")


def test_code_that_is_not_text_is_an_error(executor: SandboxExecutor) -> None:
    assert executor.execute_sync("'\ud800'").error.startswith("SyntaxError")


def test_a_megabyte_of_code_runs(executor: SandboxExecutor) -> None:
    assert executor.execute_sync("text = '" + "é" * (1 << 19) + "'\nlen(text)").result == str(1 << 19)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import asyncio\nasync def f():\n  await asyncio.sleep(0.01)\n  return 5\nasyncio.run(f())", "5"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n  x: int = 1\nP()", "P(x=1)"),
        ("import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'abc')\n'done'", "'done'"),
        ("open('a', 'w').write('text')\nimport shutil\nshutil.copyfile('a', 'b')\nopen('b').read()", "'text'"),
        ("import os\nos.makedirs('a/b')\nos.rename('a', 'c')\nos.listdir('c')", "['b']"),
        ("import sqlite3\nsqlite3.connect(':memory:').execute('select 6*7').fetchone()", "(42,)"),
        (
            "import json, datetime, decimal, fractions, statistics, hashlib, zlib\nhashlib.md5(b'').hexdigest()[:4]",
            "'d41d'",
        ),
        ("import pickle\nclass C: pass\ntype(pickle.loads(pickle.dumps(C()))).__name__", "'C'"),
        ("import zoneinfo\nstr(zoneinfo.ZoneInfo('Europe/Paris'))", "'Europe/Paris'"),
        ("__name__", "'__main__'"),
        ("import sys\nsys.argv", "['']"),
        ("import resource\nresource.getrlimit(resource.RLIMIT_CORE)", "(0, 0)"),
    ],
)
def test_ordinary_programs_work(executor: SandboxExecutor, code: str, expected: str) -> None:
    result = executor.execute_sync(code)
    if "No time zone found" in result.error:
        pytest.skip("no time zone data on this machine")
    assert (result.status, result.result) == (Status.OK, expected), result


def test_usage_is_measured(executor: SandboxExecutor) -> None:
    usage = executor.execute_sync("x = bytearray(50 << 20)\nsum(range(3 * 10**6))").usage
    assert 0.01 < usage.cpu_seconds <= usage.wall_seconds + 0.05
    assert 50 << 20 < usage.peak_memory_bytes < 200 << 20
