"""Makes every attack of ``sandbox_attacks`` on a running sandbox service, and prints a report as JSON.

    python -m tests.support.sandbox_service_attacks 127.0.0.1:50052

The program must run beside the service, for example in the container of a deployed service, so that it sees what an
attack has changed there. It needs the packages of the service. :func:`packed` makes one file of the program:

    program="base64 -d >/tmp/attacks && python /tmp/attacks 127.0.0.1:50052"
    kubectl exec -i deployment/nanochat-sandbox -- sh -c "$program"
"""

import argparse
import base64
import io
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

import grpc

from nanochat_core.protos import sandbox_pb2, sandbox_pb2_grpc
from nanochat_core.sandbox import ExecutionResult, Limits, Status, Usage
from tests.support import sandbox_attacks
from tests.support.sandbox_attacks import ATTACKS, Target, check

_START = "from tests.support.sandbox_service_attacks import main\nmain()\n"


class RemoteExecutor:
    """Calls a sandbox service. It has the only method of an executor that the attacks need."""

    def __init__(self, address: str) -> None:
        self._stub = sandbox_pb2_grpc.SandboxStub(grpc.insecure_channel(address))
        self.profile: str = self._stub.GetInfo(sandbox_pb2.GetInfoRequest(), timeout=10).profile

    def execute_sync(self, code: str, limits: Limits | None = None) -> ExecutionResult:
        request = sandbox_pb2.ExecuteRequest(code=code)
        if limits is not None:
            request.limits.CopyFrom(sandbox_pb2.Limits(**vars(limits)))
        reply = self._stub.Execute(request, timeout=60)
        return ExecutionResult(
            Status(sandbox_pb2.Status.Name(reply.status).removeprefix("STATUS_").lower()),
            reply.stdout,
            reply.stderr,
            reply.result if reply.HasField("result") else None,
            reply.error,
            reply.truncated,
            Usage(reply.usage.wall_seconds, reply.usage.cpu_seconds, reply.usage.peak_memory_bytes),
            reply.profile,
        )


def packed() -> str:
    """This program and the attacks, as one file that Python can run, in base64."""
    files = {"tests/__init__.py": "", "tests/support/__init__.py": "", "__main__.py": _START}
    for source in (sandbox_attacks.__file__, __file__):
        files[f"tests/support/{Path(source).name}"] = Path(source).read_text()
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return base64.b64encode(content.getvalue()).decode()


def privileges(pid: int) -> dict[str, object]:
    """What the kernel allows a process: its user, all its capabilities as a number, and whether it may get more."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    capabilities = 0
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        capabilities |= int(status[name], 16)
    return {
        "user": int(status["Uid"].split()[0]),
        "capabilities": capabilities,
        "may_gain_privileges": status["NoNewPrivs"] != "1",
        "read_only_root": bool(os.statvfs("/").f_flag & os.ST_RDONLY),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("--pid", type=int, default=1, help="process of the service, which attacks try to reach")
    parser.add_argument("--only", default="", help="make only the attacks whose names contain this text")
    arguments = parser.parse_args()
    executor = RemoteExecutor(arguments.address)
    attacks = [attack for attack in ATTACKS if arguments.only in attack.name]
    failures = {}
    with tempfile.TemporaryDirectory() as folder:
        target = Target(folder)
        target.places["@PARENT@"] = str(arguments.pid)
        for attack in attacks:
            try:
                check(executor, target, attack)
            except (AssertionError, grpc.RpcError) as error:
                failures[attack.name] = str(error)
    report = {"profile": executor.profile, **privileges(arguments.pid), "attacks": len(attacks), "failures": failures}
    print(json.dumps(report, indent=2))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
