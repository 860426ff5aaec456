"""The common part of all job programs: two settings, how a program starts and ends, and the command of a program."""

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from nanochat_core import logs
from nanochat_core.errors import run_main
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings that every job has."""

    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")


SettingsT = TypeVar("SettingsT", bound=JobSettings)


def run_program(
    module: str,
    name: str,
    settings_class: type[SettingsT],
    run: Callable[[SettingsT], object],
    argv: Sequence[str] | None = None,
) -> None:
    """Run the program ``python -m <module>`` to its end: :func:`run_command` within :func:`run_main`."""
    run_main(lambda: run_command(module, name, settings_class, run, argv), f"python -m {module}")


def run_command(
    command: str,
    name: str,
    settings_class: type[SettingsT],
    run: Callable[[SettingsT], object],
    argv: Sequence[str] | None = None,
) -> None:
    """Read the settings from flags and environment variables, start the logs, and call ``run``.

    Args:
        command: module and subcommand for the usage text, such as ``jobs.train.dataset list``.
        name: name of the program in its log lines, such as ``chat-eval``. Its environment variables then begin with
            ``NANOCHAT_CHAT_EVAL``.
        argv: arguments that replace the arguments of the command line.
    """
    prefix = f"NANOCHAT_{name.upper().replace('-', '_')}"
    settings = load(settings_class, prefix=prefix, program=f"python -m {command}", argv=argv)
    logs.configure(name, settings.log_level)
    run(settings)


def command_line(module: str, *arguments: str, **flags: str) -> str:
    """The shell command that runs ``python -m <module>`` with these flags and arguments, ready to be copied.

    ``home="x"`` becomes ``--home x``. The interpreter is the one of this process, because another one may not have the
    project's packages.
    """
    python, here = Path(sys.executable), Path.cwd()
    words = [str(python.relative_to(here) if python.is_relative_to(here) else python), "-m", module]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", value]
    return shlex.join([*words, *arguments])
