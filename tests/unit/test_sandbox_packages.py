"""Code may import chosen packages, and its figures come back as files."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_core.sandbox import (
    Inputs,
    Limits,
    SandboxConfig,
    SandboxExecutor,
    SandboxUnavailable,
    Status,
    profiles,
)
from nanochat_core.sandbox.worker import protocol
from tests.support.drawing import PRELOAD, SINE, packages_dir

LIMITS = Limits(wall_seconds=20, cpu_seconds=10, memory_bytes=512 << 20)
TWO_FIGURES = f"""{SINE}
plt.figure()
plt.hist(np.random.rand(50))
"""


@pytest.fixture(scope="module", params=["bwrap", "pod", "pod without mounts"])
def executor(request: pytest.FixtureRequest) -> Iterator[SandboxExecutor]:
    profile, _, without_mounts = request.param.partition(" ")
    config = SandboxConfig(profile=profile, packages_dir=packages_dir(), preload=PRELOAD, warm=1)
    with pytest.MonkeyPatch.context() as patch:
        if without_mounts:
            patch.setattr(profiles.PodProfile, "mounts", protocol.NO_MOUNTS)
        try:
            started = SandboxExecutor(config).start()
        except SandboxUnavailable as error:
            pytest.skip(str(error))
        yield started
        started.close()


def test_figures_come_back_as_pictures(executor: SandboxExecutor) -> None:
    result = executor.execute_sync(TWO_FIGURES, LIMITS, inputs=Inputs(collect_files=True))
    assert (result.status, result.error) == (Status.OK, "")
    assert sorted(result.files) == ["figure-1.png", "figure-2.png"]
    assert all(picture.startswith(b"\x89PNG\r\n\x1a\n") for picture in result.files.values())


def test_the_fork_server_of_numerical_packages_has_one_thread(executor: SandboxExecutor) -> None:
    (server,) = executor.fork_servers
    assert len(list(Path(f"/proc/{server.pid}/task").iterdir())) == 1


def test_each_call_has_other_random_numbers(executor: SandboxExecutor) -> None:
    drawn = {executor.execute_sync("import numpy\nfloat(numpy.random.rand())", LIMITS).result for _ in range(3)}
    assert len(drawn) == 3


def test_packages_cannot_be_changed(executor: SandboxExecutor) -> None:
    result = executor.execute_sync("import numpy\nopen(numpy.__file__, 'a')")
    assert result.status in (Status.DENIED, Status.ERROR)
    assert executor.execute_sync("12/60").result == "0.2"
