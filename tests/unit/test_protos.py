"""The committed gRPC stubs match the .proto files."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("nanochat_core/protos")
PROTOS = sorted(path.name for path in (ROOT / FOLDER).glob("*.proto"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    options = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    sources = [str(FOLDER / name) for name in PROTOS]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *options, *sources]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out / FOLDER


@pytest.mark.parametrize("proto", PROTOS)
@pytest.mark.parametrize("ending", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
def test_stubs_are_up_to_date(generated: Path, proto: str, ending: str) -> None:
    name = proto.removesuffix(".proto") + ending
    committed = (ROOT / FOLDER / name).read_text()
    assert committed == (generated / name).read_text(), f"{name} is not made of {proto} as it is: run make protos"


def test_no_stub_is_left_of_a_contract_that_is_gone(generated: Path) -> None:
    committed = {path.name for path in (ROOT / FOLDER).glob("*_pb2*")}
    assert committed == {path.name for path in generated.iterdir()}
    assert PROTOS == ["engine.proto", "sandbox.proto"]
