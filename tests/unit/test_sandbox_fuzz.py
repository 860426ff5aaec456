"""Random programs under every isolation profile that works on this machine; ``sandbox_fuzz`` runs them for longer."""

import asyncio
import os
import tempfile

import pytest

from nanochat_core.sandbox import SandboxConfig, SandboxExecutor, SandboxUnavailable, profiles
from nanochat_core.sandbox.worker import protocol
from tests.support import sandbox_fuzz
from tests.support.sandbox_attacks import SECRET_VARIABLE, Target

# The programs take a few seconds, or much longer on a busy machine.
SECONDS, PROGRAMS = 240, 300


@pytest.mark.parametrize("name", ["bwrap", "pod", "pod without mounts"])
def test_random_programs_leak_and_break_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    profile, _, without_mounts = name.partition(" ")
    if without_mounts:
        monkeypatch.setattr(profiles.PodProfile, "mounts", protocol.NO_MOUNTS)
    config = SandboxConfig(profile=profile, scratch_bytes=4 << 20)  # type: ignore[arg-type]
    seed = int.from_bytes(os.urandom(4))
    try:
        with tempfile.TemporaryDirectory() as folder, SandboxExecutor(config) as executor:
            counts = asyncio.run(sandbox_fuzz.fuzz(executor, Target(folder), SECONDS, seed, PROGRAMS))
            del os.environ[SECRET_VARIABLE]
    except SandboxUnavailable as error:
        pytest.skip(str(error))
    assert sum(counts.values()) >= PROGRAMS, f"seed {seed}"
