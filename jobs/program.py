"""The common part of the job programs: two settings, startup and exit, a folder for results, and a command line."""

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from nanochat_core import logs
from nanochat_core.errors import UserError, run_main
from nanochat_core.paths import user_path
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSettings:
    """Settings that every job has."""

    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:  # noqa: ARG003
        """Values that replace the defaults of settings, by the settings' names.

        ``given`` has the values of flags and environment variables. They take precedence over the returned values.
        """
        return {}


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


def print_subcommands(program: str, subcommands: Mapping[str, type[JobSettings]]) -> None:
    """Print the help of a program that consists of subcommands.

    The help has the name of each subcommand, and the first line of the docstring of the subcommand's settings.
    """
    print(f"usage: {program} COMMAND [FLAGS]; {program} COMMAND --help lists the command's flags\n")
    for name, settings in subcommands.items():
        print(f"  {name:12}{(settings.__doc__ or '').strip().splitlines()[0]}")


def run_command(
    command: str,
    name: str,
    settings_class: type[SettingsT],
    run: Callable[[SettingsT], object],
    argv: Sequence[str] | None = None,
) -> None:
    """Read the settings from flags and environment variables, start the logs, and call ``run``.

    If the environment says that this process is a rank other than the first, only warnings and errors are logged, and
    the program's name in the log lines ends with the rank's number.

    Args:
        command: module and subcommand for the usage text, such as ``jobs.train.dataset list``.
        name: name of the program in its log lines, such as ``chat-eval``. The environment variables of its settings
            then begin with ``NANOCHAT_CHAT_EVAL``, except those with a name of their own, such as ``NANOCHAT_HOME``.
        argv: arguments that replace the arguments of the command line.
    """
    prefix = f"NANOCHAT_{name.upper().replace('-', '_')}"
    settings = load(
        settings_class, prefix=prefix, program=f"python -m {command}", argv=argv, inherit=settings_class.inherited
    )
    alone = os.environ.get("WORLD_SIZE", "1") in ("", "1")
    rank = "0" if alone else os.environ.get("RANK", "0")
    if rank == "0":
        logs.configure(name, settings.log_level)
    else:
        logs.configure(f"{name}-{rank}", "warning")
    run(settings)


def make_output_folder(path: str, flag: str) -> Path:
    """Make the folder ``path`` unless it exists. If this fails, raises a :class:`UserError` that names ``flag``."""
    folder = user_path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be made: {error.strerror}") from error
    return folder


def command_line(module: str, *arguments: str, **flags: str) -> str:
    """The shell command that runs ``python -m <module>`` with the given flags and arguments, ready to be copied.

    ``home="x"`` becomes ``--home x``. The command uses the interpreter of this process, because another interpreter
    may lack the project's packages.
    """
    python, here = Path(sys.executable), Path.cwd()
    words = [str(python.relative_to(here) if python.is_relative_to(here) else python), "-m", module]
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", value]
    return shlex.join([*words, *arguments])
