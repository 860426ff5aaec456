"""Makes ``docs/flags.md``, which lists every flag of every program, from the programs' own settings.

``make docs`` (``python -m tests.support.flag_reference``) writes the page. ``tests/unit/test_docs.py`` checks
that the page is current.
"""

import dataclasses
import typing
from pathlib import Path
from typing import Any

from deploy.chat.settings import ChatSettings
from deploy.local import LocalSettings
from jobs.eval.bench_engine import BenchEngineSettings
from jobs.eval.calibrate import CalibrateSettings
from jobs.eval.chat import ChatEvalSettings
from jobs.eval.compare import CompareSettings
from jobs.eval.core import CoreSettings
from jobs.eval.gate import GateSettings
from jobs.eval.generate import GenerateSettings
from jobs.eval.gpu import GpuSettings
from jobs.eval.report import ReportSettings
from jobs.eval.tokenizer import TokenizerEvalSettings
from jobs.teach.settings import TeachSettings
from jobs.teach.watch import WatchSettings
from jobs.train.dataset import ConvertSettings, DownloadSettings, ListSettings, ValidateSettings
from jobs.train.export import ExportSettings
from jobs.train.import_nanochat import ImportSettings
from jobs.train.pipeline import PipelineSettings
from jobs.train.pretrain import PretrainSettings
from jobs.train.rl import RlSettings
from jobs.train.scaling import LawsSettings, MiniseriesSettings
from jobs.train.sft import SftSettings
from jobs.train.tokenizer import TokenizerSettings
from services.engine.settings import EngineSettings
from services.gateway.keys import COMMANDS as KEY_COMMANDS
from services.gateway.settings import GatewaySettings
from services.sandbox.settings import SandboxSettings

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "flags.md"

# The program, the prefix of its environment variables, and its settings class.
PROGRAMS: list[tuple[str, str, type[Any]]] = [
    ("deploy.local", "NANOCHAT_LOCAL", LocalSettings),
    ("deploy.chat", "NANOCHAT_CHAT", ChatSettings),
    ("services.gateway", "NANOCHAT_GATEWAY", GatewaySettings),
    *((f"services.gateway.keys {name}", "NANOCHAT_KEYS", command.settings) for name, command in KEY_COMMANDS.items()),
    ("services.engine", "NANOCHAT_ENGINE", EngineSettings),
    ("services.sandbox", "NANOCHAT_SANDBOX", SandboxSettings),
    ("jobs.train.pipeline", "NANOCHAT_PIPELINE", PipelineSettings),
    ("jobs.train.dataset download", "NANOCHAT_DATASET", DownloadSettings),
    ("jobs.train.dataset convert", "NANOCHAT_DATASET", ConvertSettings),
    ("jobs.train.dataset validate", "NANOCHAT_DATASET", ValidateSettings),
    ("jobs.train.dataset list", "NANOCHAT_DATASET", ListSettings),
    ("jobs.train.tokenizer", "NANOCHAT_TOKENIZER", TokenizerSettings),
    ("jobs.train.pretrain", "NANOCHAT_PRETRAIN", PretrainSettings),
    ("jobs.train.sft", "NANOCHAT_SFT", SftSettings),
    ("jobs.train.rl", "NANOCHAT_RL", RlSettings),
    ("jobs.train.scaling miniseries", "NANOCHAT_MINISERIES", MiniseriesSettings),
    ("jobs.train.scaling laws", "NANOCHAT_LAWS", LawsSettings),
    ("jobs.train.import_nanochat", "NANOCHAT_IMPORT", ImportSettings),
    ("jobs.teach", "NANOCHAT_TEACH", TeachSettings),
    ("jobs.teach.watch", "NANOCHAT_TEACHER", WatchSettings),
    ("jobs.eval.generate", "NANOCHAT_GENERATE", GenerateSettings),
    ("jobs.train.export", "NANOCHAT_EXPORT", ExportSettings),
    ("jobs.eval.chat", "NANOCHAT_CHAT_EVAL", ChatEvalSettings),
    ("jobs.eval.core", "NANOCHAT_CORE", CoreSettings),
    ("jobs.eval.tokenizer", "NANOCHAT_TOKENIZER_EVAL", TokenizerEvalSettings),
    ("jobs.eval.report", "NANOCHAT_REPORT", ReportSettings),
    ("jobs.eval.compare", "NANOCHAT_COMPARE", CompareSettings),
    ("jobs.eval.gate", "NANOCHAT_GATE", GateSettings),
    ("jobs.eval.bench_engine", "NANOCHAT_BENCH_ENGINE", BenchEngineSettings),
    ("jobs.eval.calibrate", "NANOCHAT_CALIBRATE", CalibrateSettings),
    ("jobs.eval.gpu", "NANOCHAT_GPU", GpuSettings),
]

INTRODUCTION = """# All flags

`make docs` writes this page from the programs' settings. Each flag `--some-flag` is also an environment variable
`PREFIX_SOME_FLAG`; the prefix stands beside the program's name. The last column names variables that do not follow this
rule. A flag wins over its variable, and the variable wins over the default. A dash means that the flag is not set.
"""


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([INTRODUCTION, *(section(*program) for program in PROGRAMS)])


def section(program: str, prefix: str, settings: type[Any]) -> str:
    """The heading and the table of one program."""
    hints = typing.get_type_hints(settings)
    rows = [row(field, hints[field.name]) for field in dataclasses.fields(settings)]
    return "\n".join(
        [f"## `{program}` (`{prefix}`)\n", "| Flag | Default | Meaning |", "| --- | --- | --- |", *rows, ""]
    )


def row(field: dataclasses.Field[Any], hint: Any) -> str:
    flag = "--" + field.name.replace("_", "-")
    flags = f"`{flag}`, `--no-{flag[2:]}`" if hint is bool else f"`{flag}`"
    meaning = field.metadata["help"].replace("|", "\\|").replace("<", "&lt;")
    if typing.get_origin(hint) is typing.Literal:
        meaning += ": " + " / ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if field.metadata["env"]:
        meaning += f" (`{field.metadata['env']}`)"
    return f"| {flags} | {shown(field.default)} | {meaning} |"


def shown(default: Any) -> str:
    """The text of a default value in the tables."""
    if default is dataclasses.MISSING:
        return "required"
    if default in (None, "", ()):
        return "—"
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, str):
        return default.removeprefix(f"{ROOT}/")
    return f"{default:,}" if isinstance(default, int) and default >= 10_000 else str(default)


if __name__ == "__main__":
    PAGE.write_text(page())
