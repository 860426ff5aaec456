"""The launcher ends its jobs in an orderly way on every signal, and Ctrl-C on a terminal prints no traceback."""

import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A job that needs a moment to save its state. Like any Python program, it would print a traceback after a SIGINT.
JOB = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (Path(sys.argv[1]).write_text("saved"), sys.exit(143)))
Path(sys.argv[1]).write_text("running")
time.sleep(60)
"""
LAUNCHER = """
import sys
from jobs.train.launcher import Launcher
launcher = Launcher()
launcher.forward_signals()
sys.exit(launcher.run([sys.executable, "-c", sys.argv[1], sys.argv[2]]))
"""


def wait_for(state: Path, text: str) -> None:
    deadline = time.monotonic() + 30
    while not state.is_file() or state.read_text() != text:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_signal_that_ends_the_launcher_lets_the_job_save(tmp_path: Path, number: signal.Signals) -> None:
    state = tmp_path / "state"
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, JOB, str(state)], stderr=subprocess.PIPE, text=True)
    wait_for(state, "running")
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert state.read_text() == "saved"
    assert errors == ""


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    state = tmp_path / "state"
    process = subprocess.Popen(["nohup", sys.executable, "-c", LAUNCHER, JOB, str(state)], stderr=subprocess.PIPE)
    wait_for(state, "running")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.terminate()
    assert process.wait(30) == 143


def test_a_failing_job_gives_its_own_code(tmp_path: Path) -> None:
    failing = [sys.executable, "-c", LAUNCHER, "raise SystemExit(2)", str(tmp_path)]
    assert subprocess.run(failing).returncode == 2


def test_ctrl_c_on_a_terminal_prints_no_traceback_even_while_a_job_imports(tmp_path: Path) -> None:
    state = tmp_path / "state"
    importing = f"from pathlib import Path; import time; Path({str(state)!r}).write_text('running'); time.sleep(60)"
    program = textwrap.dedent(LAUNCHER)
    pid, screen = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program, importing, str(state)])
    wait_for(state, "running")
    os.write(screen, b"\x03")
    shown = b""
    try:
        while chunk := os.read(screen, 4096):
            shown += chunk
    except OSError:  # the terminal is closed when the last program on it ends
        pass
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert b"Traceback" not in shown


# A job that ends with the exit code in its argument. The module ``heavy`` records its imports in a file.
PRELOADED = """
import os, signal, sys, time
import heavy
if __name__ == "__main__":
    print(os.environ["RANK"], sys.argv[1:], os.getpgid(0) == os.getpid(), flush=True)
    if sys.argv[1] == "wait":
        signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(143)))
        print("running", flush=True)
        time.sleep(60)
    sys.exit(int(sys.argv[1]))
"""
HEAVY = "import os\nwith open(os.environ['NOTED'], 'a') as noted:\n    noted.write('imported\\n')\n"
PRELOADING = """
import sys
from jobs.train.launcher import Launcher

if __name__ == "__main__":
    launcher = Launcher(["light"])
    launcher.forward_signals()
    codes = [launcher.run([sys.executable, "-m", "light", code]) for code in sys.argv[1:]]
    print(codes, flush=True)
    sys.exit(codes[-1])
"""


@pytest.fixture
def preloading(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts a launcher that runs the preloaded job once for each argument."""
    for name, program in (("light", PRELOADED), ("heavy", HEAVY), ("preloading", PRELOADING)):
        (tmp_path / f"{name}.py").write_text(program)

    def start(*arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "NOTED": str(tmp_path / "noted")}
        command = [sys.executable, "-m", "preloading", *arguments]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def test_preloaded_jobs_import_their_modules_once(
    preloading: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    output, errors = preloading("0", "7", "0").communicate(timeout=60)
    assert output.splitlines() == [
        "0 ['0'] True",
        "0 ['7'] True",
        "0 ['0'] True",
        "[0, 7, 0]",
    ]
    assert errors == ""
    assert (tmp_path / "noted").read_text() == "imported\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_preloaded_job_saves_its_state_too(
    preloading: Callable[..., subprocess.Popen[str]], number: signal.Signals
) -> None:
    process = preloading("wait")
    assert process.stdout is not None
    while process.stdout.readline() != "running\n":
        assert process.poll() is None
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert output.splitlines() == ["saved", f"[{128 + number}]"]
    assert errors == ""
    assert process.returncode == 128 + number
