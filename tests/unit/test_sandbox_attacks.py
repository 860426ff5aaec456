"""Makes every attack under every profile that works on this machine, with and without privileges."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_core.sandbox import ResultFormat, SandboxConfig, SandboxExecutor, SandboxUnavailable, profiles
from nanochat_core.sandbox.interpreter import current_executable
from nanochat_core.sandbox.worker import protocol
from tests.support import sandbox_attacks
from tests.support.sandbox_attacks import ATTACKS, Attack, Target, check, check_canary

REPOSITORY = Path(sandbox_attacks.__file__).parents[2]
NOBODY = 65534


@pytest.fixture(scope="module", params=["bwrap", "pod", "pod without mounts"])
def executor(request: pytest.FixtureRequest) -> Iterator[SandboxExecutor]:
    name, _, without_mounts = request.param.partition(" ")
    with pytest.MonkeyPatch.context() as patch:
        if without_mounts:
            patch.setattr(profiles.PodProfile, "mounts", protocol.NO_MOUNTS)
        try:
            started = SandboxExecutor(SandboxConfig(profile=name, scratch_bytes=4 << 20)).start()
        except SandboxUnavailable as error:
            pytest.skip(str(error))
        yield started
        started.close()


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    # The folder is directly in the temporary folder, where an attack would look first.
    with tempfile.TemporaryDirectory() as folder:
        yield Target(folder)
    del os.environ[sandbox_attacks.SECRET_VARIABLE]


def test_some_profile_holds_on_this_machine() -> None:
    with SandboxExecutor() as chosen:
        assert chosen.profile in ("bwrap", "pod")


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_fails(executor: SandboxExecutor, target: Target, attack: Attack) -> None:
    check(executor, target, attack)


@pytest.mark.parametrize("namespaces", [True, False], ids=["namespaces", "no-namespaces"])
def test_every_attack_fails_without_any_privilege(namespaces: bool) -> None:
    """A restricted container has no root, capabilities or namespaces. There, only the profile ``pod`` always works."""
    if os.geteuid() != 0:
        pytest.skip("these tests do not run as root, so the others have shown it")
    python = next(
        (
            path
            for path in (current_executable(), "/usr/bin/python3", "/usr/local/bin/python3")
            if _nobody_can_run(path)
        ),
        None,
    )
    if python is None:
        pytest.skip("no Python 3.11 or newer that another user could run")
    folder = tempfile.mkdtemp()
    try:
        os.chown(folder, NOBODY, NOBODY)
        (Path(folder) / "nanochat_core").mkdir()
        for name in ("__init__.py", "errors.py", "fair_slots.py", "settings.py", "sandbox"):
            source, copy = REPOSITORY / "nanochat_core" / name, Path(folder) / "nanochat_core" / name
            shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        script = shutil.copy(sandbox_attacks.__file__, folder)
        shutil.copy(REPOSITORY / "tests" / "support" / "without_namespaces.py", folder)
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        command = [python, script, "pod", folder, folder]
        if not namespaces:
            command = [python, str(Path(folder) / "without_namespaces.py"), *command]
        answer = subprocess.run(
            command,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            env=os.environ | {"PYTHONPATH": folder},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert answer.returncode == 0, answer.stderr
        report = json.loads(answer.stdout)
    finally:
        shutil.rmtree(folder)
    assert report == {"user": NOBODY, "attacks": len(ATTACKS), "own_file_systems": namespaces, "failures": {}}


def test_every_attack_fails_in_gvisor() -> None:
    if shutil.which("runsc") is None:
        pytest.skip("gVisor is not installed")
    gvisor = ["runsc", *(["--rootless"] if os.getuid() else []), "--network=none", "--ignore-cgroups", "do"]
    command = [*gvisor, current_executable(), sandbox_attacks.__file__, "gvisor", str(REPOSITORY), "/tmp"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    report = json.loads(answer.stdout)
    report.pop("user")
    found = report.pop("failures")
    assert report == {"attacks": len(ATTACKS), "own_file_systems": True}
    # gVisor cannot ask the sandbox whether a thread may start. There, recursion reaches the limit of CPU time before
    # the limit of memory. Without Landlock, code can list the names in folders of bubblewrap.
    differences = {
        "a thread goes on when the main thread has ended": "can't start new thread",
        "recursion without a limit": "CPU time limit of 4 s exceeded",
        "list /etc": "result \"['ld.so.cache']\"",
    }
    assert found.keys() <= differences.keys()
    assert all(differences[name] in text for name, text in found.items()), found


def _nobody_can_run(python: str) -> bool:
    try:
        probe = subprocess.run(
            [python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            cwd="/",
            capture_output=True,
        )
    except OSError:
        return False
    return probe.returncode == 0


@pytest.mark.parametrize(
    ("poison", "question", "answer"),
    [
        ("import builtins\nbuiltins.len = lambda x: -1\nlen('abc')", "len('abc')", "3"),
        ("import sys\nsys.modules['math'] = None", "import math\nmath.floor(2.5)", "2"),
        ("import math\nmath.sqrt = lambda x: 'poisoned'", "import math\nmath.sqrt(16)", "4.0"),
        ("import os\nos.environ['LEFT'] = 'here'", "import os\n'LEFT' in os.environ", "False"),
        ("open('left', 'w').write('here')", "import os\nos.listdir('.')", "[]"),
        ("left = 5", "'left' in globals()", "False"),
        ("import sys\nsys.stdout = sys.stderr = None", "print('seen')", None),
        (
            "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)",
            "import signal\nsignal.getsignal(14).name",
            "'SIG_DFL'",
        ),
        ("import sys\nsys.setrecursionlimit(50)", "import sys\nsys.getrecursionlimit()", "1000"),
        ("import os\nos.write(3, b'v\\0\\0forged')", "'honest'", "'honest'"),
    ],
)
def test_nothing_of_a_call_reaches_the_next(
    executor: SandboxExecutor, poison: str, question: str, answer: str | None
) -> None:
    executor.execute_sync(poison)
    for _ in range(3):
        assert executor.execute_sync(question).result == answer


def test_code_that_breaks_what_reports_it_is_still_reported(executor: SandboxExecutor) -> None:
    breaking = "import os, signal, sys\nos.write = os.close = signal.pause = sys.excepthook = sys.stdout = None\n"
    assert executor.execute_sync(breaking + "6 * 7").result == "42"
    assert executor.execute_sync(breaking + "sys.stderr = 5\n1 / 0").status.value == "error"
    check_canary(executor)


def test_two_calls_draw_different_random_numbers(executor: SandboxExecutor) -> None:
    code = "import random, os\n(random.random(), os.urandom(8), hash('x'))"
    drawn = [executor.execute_sync(code).result for _ in range(3)]
    assert len(set(drawn)) == 3


def test_a_call_cannot_find_the_scratch_folder_of_another(executor: SandboxExecutor) -> None:
    where = executor.execute_sync(
        "import os\nopen('mine', 'w').write('x')\nos.getcwd()", result_format=ResultFormat.STR
    )
    assert where.result is not None
    if executor.profile == "pod":
        assert not Path(where.result, "mine").exists(), "the file is gone with its call"
        listed = executor.execute_sync(f"import os\nos.listdir({str(Path(where.result).parent)!r})")
        assert listed.status.value == "denied"
