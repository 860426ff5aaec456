"""Calls get the right answers under every isolation profile that works on this machine."""

from collections.abc import Iterator

import pytest

from nanochat_core.sandbox import (
    Inputs,
    Limits,
    ResultFormat,
    SandboxConfig,
    SandboxExecutor,
    SandboxUnavailable,
    Status,
)
from nanochat_core.sandbox.worker import protocol


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
    assert 'File "<code>", line 3, in half\n    return x / 0\n' in result.stderr
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
        ("exit()", "SystemExit: None"),
        ("quit(3)", "SystemExit: 3"),
        ("await 5", "TypeError: object int can't be used in 'await' expression"),
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
    result = executor.execute_sync("print('so far', end='')\nimport time\ntime.sleep(60)", Limits(wall_seconds=3))
    assert (result.status, result.stdout) == (Status.TIMEOUT, "so far")
    assert result.error == "wall time limit of 3 s exceeded"
    assert 3 <= result.usage.wall_seconds < 50


def test_the_cpu_limit_is_finer_than_a_second(executor: SandboxExecutor) -> None:
    used = []
    for _ in range(5):
        result = executor.execute_sync("while True: pass", Limits(wall_seconds=20, cpu_seconds=0.3))
        assert result.status is Status.TIMEOUT
        assert result.error == "CPU time limit of 0.3 s exceeded"
        used.append(result.usage.cpu_seconds)
    assert min(used) >= 0.3
    assert min(used) < 0.9, "on a busy machine, the executor may notice the limit late"


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
        (
            "import os, shutil\nopen('a', 'w').write('text')\nos.mkdir('d')\nshutil.copy('a', 'b')\n"
            "shutil.copy2('a', 'd')\nshutil.copytree('d', 'e')\nopen('b').read(), open('e/a').read()",
            "('text', 'text')",
        ),
        (
            "import sqlite3\nfor n in (1, 2):\n  with sqlite3.connect('a?b.db') as base:\n"
            "    base.execute('create table if not exists t (n)')\n    base.execute('insert into t values (?)', (n,))\n"
            "  base.close()\nimport os\n"
            "os.listdir('.'), sqlite3.connect('file:a%3fb.db', uri=True).execute('select n from t').fetchall()",
            "(['a?b.db'], [(1,), (2,)])",
        ),
        (
            "import sqlite3\na, b = (sqlite3.connect('x', 0.0) for _ in 'ab')\na.execute('create table t (n)')\n"
            "a.execute('begin exclusive')\ntry: b.execute('insert into t values (1)')\n"
            "except sqlite3.OperationalError as error: print(error)\na.commit()\n"
            "b.execute('insert into t values (1)').rowcount",
            "1",
        ),
        ("import dbm\nwith dbm.open('d', 'c') as d: d['a'] = 'b'\ndict(dbm.open('d'))", "{b'a': b'b'}"),
        ("import shelve\nwith shelve.open('d') as d: d['a'] = [1]\ndict(shelve.open('d'))", "{'a': [1]}"),
        ("import os\nos.makedirs('a/b')\nos.rename('a', 'c')\nos.listdir('c')", "['b']"),
        ("import sqlite3\nsqlite3.connect(':memory:').execute('select 6*7').fetchone()", "(42,)"),
        (
            "import json, datetime, decimal, fractions, statistics, hashlib, zlib\nhashlib.md5(b'').hexdigest()[:4]",
            "'d41d'",
        ),
        ("import pickle\nclass C: pass\ntype(pickle.loads(pickle.dumps(C()))).__name__", "'C'"),
        ("import zoneinfo\nstr(zoneinfo.ZoneInfo('Europe/Paris'))", "'Europe/Paris'"),
        ("import asyncio\nawait asyncio.sleep(0.01)\nx = 5\nawait asyncio.sleep(0, x)", "5"),
        ("async def f():\n  yield 1\n  yield 2\n[n async for n in f()]", "[1, 2]"),
        ("import asyncio\nlock = asyncio.Lock()\nasync with lock:\n  x = lock.locked()\nx", "True"),
        ("import asyncio\nawait asyncio.to_thread(sum, [1, 2])", "3"),
        (
            "import asyncio, time\nfrom concurrent.futures import ThreadPoolExecutor\n"
            "def slow(n):\n  time.sleep(0.01)\n  return n\n"
            "async def main():\n  asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(64))\n"
            "  return sum(await asyncio.gather(*(asyncio.to_thread(slow, n) for n in range(100))))\n"
            "await main()",
            "4950",
        ),
        (
            "from concurrent.futures import ThreadPoolExecutor\nimport time\n"
            "with ThreadPoolExecutor(64) as pool: x = list(pool.map(lambda n: time.sleep(0.01) or n, range(64)))\n"
            "x == list(range(64))",
            "True",
        ),
        (
            "import threading\nthreads = [threading.Thread(target=print, args=(n,)) for n in range(200)]\n"
            "for thread in threads: thread.start(), thread.join()\nthreading.active_count()",
            "1",
        ),
        ("help(len)", "None"),
        ("__name__", "'__main__'"),
        ("import sys\nsys.argv", "['']"),
        ("import resource\nresource.getrlimit(resource.RLIMIT_CORE)", "(0, 0)"),
    ],
)
def test_ordinary_programs_work(executor: SandboxExecutor, code: str, expected: str) -> None:
    result = executor.execute_sync(code)
    if "No time zone found" in result.error:
        pytest.skip("no time zone data on this machine")
    assert (result.status, str(result.result)) == (Status.OK, expected), result


def test_a_call_waits_for_its_threads_and_their_output(executor: SandboxExecutor) -> None:
    code = "import threading, time\ndef f():\n  time.sleep(0.1)\n  print('late')\nthreading.Thread(target=f).start()\n5"
    result = executor.execute_sync(code)
    assert (result.status, result.result, result.stdout) == (Status.OK, "5", "late\n")


def test_threads_are_limited_in_number(executor: SandboxExecutor) -> None:
    code = (
        "import threading\ngo = threading.Event()\nstarted = 0\ntry:\n"
        "  while True:\n    threading.Thread(target=go.wait).start()\n    started += 1\n"
        "except RuntimeError as error: print(error)\ngo.set()\nstarted"
    )
    result = executor.execute_sync(code)
    assert (result.stdout, result.result) == ("can't start new thread\n", str(executor.config.threads))
    with SandboxExecutor(SandboxConfig(profile=executor.config.profile, threads=0)) as without:
        assert without.execute_sync(code).result == "0"


def test_the_cpu_time_of_all_threads_counts(executor: SandboxExecutor) -> None:
    code = (
        "import hashlib, threading\ndef f():\n  while True: hashlib.sha256(bytes(1 << 16)).digest()\n"
        "for _ in range(4): threading.Thread(target=f).start()"
    )
    used = []
    for _ in range(3):
        result = executor.execute_sync(code, Limits(wall_seconds=20, cpu_seconds=0.5))
        assert (result.status, result.error) == (Status.TIMEOUT, "CPU time limit of 0.5 s exceeded")
        used.append(result.usage.cpu_seconds)
    assert 0.5 <= min(used) < 2, "on a busy machine, the executor may notice the limit late"


def test_modes_times_and_links_work_in_a_file_system_of_the_call(executor: SandboxExecutor) -> None:
    code = "import os\nopen('f', 'w').close()\nos.chmod('f', 0o640)\nos.utime('f', (1, 2))\nfound = os.stat('f')\n"
    link = "os.symlink('f', 'link')\n(found.st_mode & 0o777, found.st_mtime, os.readlink('link'))"
    if not executor.own_file_systems:
        assert executor.execute_sync(code).ok, "modes and times have no effect"
        assert executor.execute_sync(code + link).status is Status.DENIED
        return
    assert executor.execute_sync(code + link).result == "(416, 2.0, 'f')"


def test_the_code_gets_stdin_arguments_and_files(executor: SandboxExecutor) -> None:
    inputs = Inputs(stdin="über".encode() * 10**5, argv=("-v", "zwei"), files={"a/b/c.txt": b"nested", "d": b""})
    code = "import os, sys\n(len(sys.stdin.read()), sys.argv, open('a/b/c.txt').read(), sorted(os.listdir('.')))"
    assert executor.execute_sync(code, inputs=inputs).result == ("(400000, ['', '-v', 'zwei'], 'nested', ['a', 'd'])")
    assert executor.execute_sync("input(), input()", inputs=Inputs(stdin=b"1\n2")).result == "('1', '2')"
    assert executor.execute_sync("6 * 7", inputs=Inputs(stdin=b"unread" * 10**5)).result == "42"


def test_files_that_the_code_made_or_changed_come_back(executor: SandboxExecutor) -> None:
    inputs = Inputs(files={"kept": b"1", "changed": b"1", "removed": b"1"}, collect_files=True)
    code = (
        "import os\nos.remove('removed')\nopen('changed', 'a').write('2')\nos.makedirs('x/y')\n"
        "open('x/y/new', 'wb').write(bytes(3))\nos.chdir('x')\n"
    )
    result = executor.execute_sync(code + "'value'", inputs=inputs)
    assert (result.status, result.result) == (Status.OK, "'value'")
    assert result.files == {"changed": b"12", "x/y/new": bytes(3)}
    failed = executor.execute_sync(code + "1 / 0", inputs=inputs)
    assert (failed.status, set(failed.files)) == (Status.ERROR, {"changed", "x/y/new"})
    assert executor.execute_sync(code).files == {}


def test_only_wanted_files_and_values_that_draw_themselves_come_back(executor: SandboxExecutor) -> None:
    code = (
        "import os\nos.mkdir('d')\nfor name in ('a.png', 'd/b.svg', 'c.txt'): open(name, 'w').write(name)\n"
        "class Drawing:\n  def _repr_png_(self): return None\n  def _repr_svg_(self): return '<svg/>'\n"
        "  def __repr__(self): return 'drawing'\n"
    )
    result = executor.execute_sync(code + "Drawing()", inputs=Inputs(collect_files=True, collect_endings=(".svg",)))
    assert (result.result, result.files) == ("drawing", {"d/b.svg": b"d/b.svg", "result.svg": b"<svg/>"})
    both = executor.execute_sync(code, inputs=Inputs(collect_files=True, collect_endings=(".svg", ".png")))
    assert set(both.files) == {"a.png", "d/b.svg"}
    assert executor.execute_sync(code + "Drawing", inputs=Inputs(collect_files=True)).ok, "a class cannot draw itself"


@pytest.mark.parametrize(
    "code",
    [
        "open('a', 'w').write('fits')\nopen('b', 'wb').write(bytes(5 << 20))",
        "open('a', 'w').write('fits')\nfor n in range(101): open(f'b{n:03}', 'w').close()",
    ],
    ids=["bytes", "files"],
)
def test_files_beyond_the_limit_are_left_out_and_named(executor: SandboxExecutor, code: str) -> None:
    result = executor.execute_sync(code, inputs=Inputs(collect_files=True))
    assert (result.status, result.truncated) == (Status.OUTPUT_LIMIT, True)
    assert result.error == "limit of 4194304 bytes or 100 files exceeded"
    assert result.files["a"] == b"fits"


def test_an_error_of_the_code_is_its_status_although_files_are_beyond_the_limit(executor: SandboxExecutor) -> None:
    code = "open('b', 'wb').write(bytes(5 << 20))\n1 / 0"
    result = executor.execute_sync(code, inputs=Inputs(collect_files=True))
    assert (result.status, result.error) == (Status.ERROR, "ZeroDivisionError: division by zero")
    assert (result.truncated, result.files_complete) == (True, False)


def test_forged_files_are_files_of_the_forging_call_only(executor: SandboxExecutor) -> None:
    fields = [b"../up", b"1", b"/etc/passwd", b"1", b"a//b", b"1", b"\xff", b"1", b"n\0", b"1", b"fine", b"1"]
    claim = protocol.pack_claim(protocol.VALUE, result=protocol.pack_outputs(b"forged", fields, cut=False))
    for end in (claim, claim + b"\xff" * 9, claim[:-3]):
        code = f"import os, time\nos.write(3, {end!r})\nos.close(3)\ntime.sleep(5)"
        result = executor.execute_sync(code, inputs=Inputs(collect_files=True))
        assert result.result == "forged"
        assert set(result.files) <= {"fine"}


@pytest.mark.parametrize("name", ["", "/abs", "../up", "a/../b", "a//b", ".", "a/", "n\0", "x" * 300, "\ud800", "a\nb"])
def test_names_outside_of_the_scratch_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="not a relative path"):
        Inputs(files={name: b""})


def test_usage_is_measured(executor: SandboxExecutor) -> None:
    usage = executor.execute_sync("x = bytearray(50 << 20)\nsum(range(3 * 10**6))").usage
    assert 0.01 < usage.cpu_seconds <= usage.wall_seconds + 0.05
    assert 50 << 20 < usage.peak_memory_bytes < 200 << 20
