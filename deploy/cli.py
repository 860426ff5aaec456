"""The ``nanochat`` command, which starts the programs that people use.

``nanochat train pretrain --depth 4`` replaces its own process by ``python -m jobs.train.pretrain --depth 4``. Both
command lines therefore have the same settings, help and exit code.
"""

import ast
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanochat_core.errors import UserError, run_main

ROOT = Path(__file__).parents[1]

# For each program, its module and its line in the help.
PROGRAMS = {
    "run": ("deploy.local", "Serve the chat page, and train the demo model if there is none"),
    "chat": ("deploy.chat", "Chat in the terminal with a running server"),
    "train tokenizer": ("jobs.train.tokenizer", "Train a tokenizer"),
    "train dataset": ("jobs.train.dataset", "Download, convert, validate or list datasets"),
    "train pretrain": ("jobs.train.pretrain", "Train a base model on text"),
    "train sft": ("jobs.train.sft", "Fine-tune a model on conversations"),
    "train rl": ("jobs.train.rl", "Train a model by reinforcement learning"),
    "train pipeline": ("jobs.train.pipeline", "Run all stages of a recipe, from tokenizer to promotion"),
    "train scaling": ("jobs.train.scaling", "Study how the loss depends on model size and data"),
    "train import-nanochat": ("jobs.train.import_nanochat", "Import a checkpoint of karpathy/nanochat"),
    "train export": ("jobs.train.export", "Export a checkpoint for transformers or karpathy/nanochat"),
    "teach": ("jobs.teach", "Teach a model your facts; list and take back its lessons"),
    "generate": ("jobs.eval.generate", "Continue or answer a prompt in the terminal"),
    "eval chat": ("jobs.eval.chat", "Score a chat model on tasks such as MMLU and GSM8K"),
    "eval core": ("jobs.eval.core", "Score a base model on CORE"),
    "eval report": ("jobs.eval.report", "Write the report card of a model"),
    "eval compare": ("jobs.eval.compare", "Compare the results of models"),
    "eval gate": ("jobs.eval.gate", "Promote a model if it passes the gate"),
    "eval bench-engine": ("jobs.eval.bench_engine", "Measure the speed of the inference engine"),
    "eval calibrate": ("jobs.eval.calibrate", "Show the measured times of CPU libraries, and the chosen libraries"),
    "eval gpu": ("jobs.eval.gpu", "Check the results of a GPU and measure its speed"),
    "eval tokenizer": ("jobs.eval.tokenizer", "Measure the compression of a tokenizer"),
    "serve gateway": ("services.gateway", "Serve the REST API and the chat page"),
    "serve engine": ("services.engine", "Serve a model over gRPC"),
    "serve sandbox": ("services.sandbox", "Run the model's Python code in isolation"),
    "keys": ("services.gateway.keys", "Create, list, rotate and revoke API keys, and show their usage"),
}
COMPLETION = "completion"
# Lines in front of the completion script. Zsh must first load its emulation of bash's completion, so that the same
# script works in both shells.
COMPLETION_HEADER = {"bash": "", "zsh": "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"}
COMPLETION_SCRIPT = """\
_nanochat() {
    local words=$(nanochat completion words "${COMP_WORDS[@]:1:COMP_CWORD-1}")
    COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _nanochat nanochat
"""


def help_text() -> str:
    """The list of all programs, with one line of help for each program."""
    lines = [f"  {name:24}{about}" for name, (_, about) in PROGRAMS.items()]
    lines.append(f"  {f'{COMPLETION} bash|zsh':24}Print a script for the shell: source <(nanochat {COMPLETION} bash)")
    return "\n".join(["usage: nanochat PROGRAM [FLAGS]; nanochat PROGRAM --help lists the program's flags", "", *lines])


def find_program(arguments: Sequence[str]) -> tuple[str, Sequence[str]] | None:
    """The module of the named program and the arguments after its name; None if ``arguments`` name no program."""
    for length in (1, 2):
        if (name := " ".join(arguments[:length])) in PROGRAMS:
            return PROGRAMS[name][0], arguments[length:]
    return None


def next_words(typed: Sequence[str]) -> list[str]:
    """The words that can follow ``typed``: commands, programs of a command, or flags of a program."""
    if program := find_program(typed):
        return ["--help", *sorted(set(flags(program[0])))]
    if typed and typed[0] == COMPLETION:
        return list(COMPLETION_HEADER)
    names = [*(name.split() for name in PROGRAMS), [COMPLETION]]
    return list(dict.fromkeys(name[len(typed)] for name in names if name[: len(typed)] == list(typed)))


def flags(module: str, name: str = "") -> Iterator[str]:
    """Flags of the settings class ``name`` of a module; if ``name`` is empty, flags of all its settings classes.

    The flags are read from the source code, because importing a training program takes seconds.
    """
    path = ROOT.joinpath(*module.split("."))
    source = path / ("__init__.py" if name else "settings.py") if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(source.read_text()).body
    origins = {
        alias.name: str(node.module) for node in body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    if name in origins:
        yield from flags(origins[name], name)
    for settings in body:
        if not isinstance(settings, ast.ClassDef):
            continue
        if settings.name != name if name else not settings.name.endswith("Settings"):
            continue
        for field in settings.body:
            if isinstance(field, ast.AnnAssign):
                yield "--" + ast.unparse(field.target).replace("_", "-")
        for base in map(ast.unparse, settings.bases):
            if base in origins:
                yield from flags(origins[base], base)
            elif name:
                yield from flags(module, base)


def main() -> None:
    """Replace this process by the program that the command line names, or print help or completions.

    Raises UserError if the command line names no program.
    """
    arguments = sys.argv[1:] or ["--help"]
    if program := find_program(arguments):
        module, rest = program
        os.execv(sys.executable, [sys.executable, "-m", module, *rest])  # noqa: S606 - no shell is involved
    first, second = [*arguments, "--help"][:2]
    if first in ("-h", "--help") or (second in ("-h", "--help") and next_words([first])):
        print(help_text())
    elif first == COMPLETION and second == "words":
        print(*next_words(arguments[2:]))
    elif first == COMPLETION and second in COMPLETION_HEADER:
        print(COMPLETION_HEADER[second] + COMPLETION_SCRIPT, end="")
    else:
        known = next_words([first])
        given, choices = (second, known) if known else (first, next_words([]))
        close = difflib.get_close_matches(given, choices, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"there is no {given!r}; {hint}choose one of {', '.join(choices)}")


def run() -> None:
    """Entry point of the ``nanochat`` script."""
    run_main(main, "nanochat")


if __name__ == "__main__":
    run()
