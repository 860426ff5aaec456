"""How the threads of a parallel loop wait for each other.

Problem: torch and the engine's kernels divide each operation among threads by OpenMP. At the end of an operation, the
threads wait for the slowest one, and for their next work. By default, they wait by spinning: they check for new work
again and again, for about a millisecond in GNU's library and for 200 milliseconds in Intel's and LLVM's, which keeps
their cores busy. If another process needs a core, the system then interrupts a thread in the middle of an operation,
because the thread has used up its share of the core by spinning. All other threads wait until the interrupted thread
continues, some milliseconds later, and this happens in every step of the engine.

Idea: spin only as long as the operations of a step follow each other, and then sleep. A sleeping thread keeps its share
of the core, so the system lets it run as soon as there is work.

The OpenMP libraries read their settings when they are loaded, and importing torch loads one. So the packages of all
programs that compute call :func:`limit_spinning` before anything imports torch.
"""

import os
from collections.abc import MutableMapping
from pathlib import Path

# Number of times that a waiting thread of GNU's library checks for work before it sleeps; GNU's default is 300,000.
SPINS = 1000
# Milliseconds that a waiting thread of Intel's or LLVM's library spins; the default of both libraries is 200.
BLOCK_MILLISECONDS = 0
# Variables by which a user chooses how threads wait. If one of them is set, :func:`limit_spinning` changes nothing.
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_LIBRARIES = ("libgomp", "libiomp", "libomp")


def limit_spinning(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let waiting threads sleep at once or after a short time, unless the environment says how they wait."""
    if not any(name in environ for name in VARIABLES):
        environ["GOMP_SPINCOUNT"] = str(SPINS)
        environ["KMP_BLOCKTIME"] = str(BLOCK_MILLISECONDS)


def loaded_libraries() -> list[str]:
    """Paths of the OpenMP libraries that this process has loaded; always empty on systems other than Linux.

    More than one library would mean several pools of threads.
    """
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    paths = dict.fromkeys(line.split(maxsplit=5)[5] for line in lines if line.count(" /"))
    return [path for path in paths if Path(path).name.startswith(_LIBRARIES)]
