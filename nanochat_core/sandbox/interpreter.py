"""Finds the files that a Python interpreter needs, so that the isolation can allow code to read only these files."""

import dataclasses
import json
import os
import subprocess
import sys

from nanochat_core.sandbox.interface import SandboxUnavailable

_PROBE = """
import ctypes, json, os, sys, sysconfig
with open("/proc/self/maps") as maps:
    mapped = sorted({os.path.realpath(line.split()[-1]) for line in maps if ".so" in line})
print(json.dumps({"version": sys.version_info[:2], "mapped": mapped,
    "stdlib": sorted({sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")})}))
"""

_PACKAGES = frozenset({"site-packages", "dist-packages"})


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """A Python installation.

    Attributes:
        executable: real path of the program, outside of any virtual environment.
        stdlib: folders of the standard library.
        packages: folders of installed packages inside ``stdlib``; code can never read them.
        library_dirs: folders of the system's shared libraries.
        libraries: shared libraries in other folders, such as libpython.
    """

    executable: str
    stdlib: tuple[str, ...]
    packages: tuple[str, ...]
    library_dirs: tuple[str, ...]
    libraries: tuple[str, ...]

    def readable(self) -> list[str]:
        """Files and folders that code may read: the standard library without packages, and shared libraries."""
        paths: list[str] = []
        for folder in self.stdlib:
            if any(os.path.dirname(packages) == folder for packages in self.packages):
                paths += [entry.path for entry in os.scandir(folder) if entry.name not in _PACKAGES]
            else:
                paths.append(folder)
        return [*sorted(paths), *self.library_dirs, *self.libraries]


def current_executable() -> str:
    """Real path of the running interpreter, outside of any virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def inspect(executable: str = "") -> Interpreter:
    """Run ``executable`` (by default the running interpreter) and ask it where its files are.

    Raises SandboxUnavailable if the executable cannot be run or is older than Python 3.11.
    """
    path = os.path.realpath(executable) if executable else current_executable()
    try:
        answer = subprocess.run(  # noqa: S603 - the path comes from the configuration
            [path, "-I", "-S", "-c", _PROBE], env={}, capture_output=True, text=True, timeout=20, check=True
        )
        facts = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise SandboxUnavailable(f"the sandbox's interpreter {path} cannot be run: {error}") from error
    if tuple(facts["version"]) < (3, 11):
        raise SandboxUnavailable(f"the sandbox's interpreter {path} is older than Python 3.11")
    stdlib = tuple(facts["stdlib"])
    packages = tuple(
        os.path.join(folder, name)
        for folder in stdlib
        for name in _PACKAGES
        if os.path.isdir(os.path.join(folder, name))
    )
    outside = [library for library in facts["mapped"] if not library.startswith(tuple(f"{d}/" for d in stdlib))]
    system = {os.path.dirname(library) for library in outside if os.path.basename(library).startswith(("libc.", "ld-"))}
    return Interpreter(
        executable=path,
        stdlib=stdlib,
        packages=packages,
        library_dirs=tuple(sorted(system)),
        libraries=tuple(library for library in outside if os.path.dirname(library) not in system),
    )
