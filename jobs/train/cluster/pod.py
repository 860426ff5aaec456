"""Start the ranks of one pod of a PyTorchJob or TrainJob: ``python -m jobs.train.cluster.pod MODULE FLAGS``.

Unlike ``torchrun``, this program ends with the exit code of the rank that failed first. The code tells a job controller
whether another attempt may succeed.
"""

import os
import sys
from collections.abc import Mapping

from jobs.train.launcher import Launcher
from nanochat_core.errors import UserError, run_main


def pod_environments(environ: Mapping[str, str]) -> list[dict[str, str]]:
    """Environment variables for each rank of one pod of a PyTorchJob or TrainJob, from the pod's environment.

    The operator sets the pod's number among the job's pods, the number of pods, the number of processes in each pod,
    and the address at which the ranks meet. The variables of this address are ``MASTER_ADDR`` and ``MASTER_PORT``, or
    in a TrainJob ``PET_MASTER_ADDR`` and ``PET_MASTER_PORT``.

    Raises UserError if a number is missing or is no whole number.
    """
    numbers: list[int] = []
    for name in ("PET_NODE_RANK", "PET_NNODES", "PET_NPROC_PER_NODE"):
        value = environ.get(name, "")
        if not value.isdecimal():
            problem = f"{name} is {value!r} and must be a whole number" if value else f"{name} is not set"
            raise UserError(f"this program starts the ranks of a pod of a PyTorchJob or TrainJob; {problem}")
        numbers.append(int(value))
    pod, pods, processes = numbers
    shared = {"WORLD_SIZE": str(pods * processes), "LOCAL_WORLD_SIZE": str(processes)}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environ and f"PET_{name}" in environ:
            shared[name] = environ[f"PET_{name}"]
    return [shared | {"RANK": str(pod * processes + rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def main() -> int:
    """Start the ranks of this pod and wait for their end; returns the exit code of :meth:`Launcher.run_ranks`."""
    launcher = Launcher()
    launcher.forward_signals()
    return launcher.run_ranks([sys.executable, "-m", *sys.argv[1:]], pod_environments(os.environ))


if __name__ == "__main__":
    run_main(main, "python -m jobs.train.cluster.pod")
