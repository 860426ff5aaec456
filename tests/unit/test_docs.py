"""The documentation names what exists: files, links, make targets, and every flag of the jobs with its default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.eval.bench_engine import BenchEngineSettings
from jobs.eval.chat import ChatEvalSettings
from jobs.eval.report import ReportSettings
from jobs.eval.tokenizer import TokenizerEvalSettings
from jobs.train.dataset import ConvertSettings, DownloadSettings, ListSettings, ValidateSettings
from jobs.train.import_nanochat import ImportSettings
from jobs.train.pipeline import PipelineSettings
from jobs.train.pretrain import PretrainSettings
from jobs.train.rl import RlSettings
from jobs.train.scaling import LawsSettings, MiniseriesSettings
from jobs.train.sft import SftSettings
from jobs.train.tokenizer import TokenizerSettings

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
JOBS = {
    "jobs.train.pipeline": PipelineSettings,
    "jobs.train.tokenizer": TokenizerSettings,
    "jobs.train.pretrain": PretrainSettings,
    "jobs.train.sft": SftSettings,
    "jobs.train.rl": RlSettings,
    "jobs.eval.tokenizer": TokenizerEvalSettings,
    "jobs.train.import_nanochat": ImportSettings,
    "jobs.train.scaling miniseries": MiniseriesSettings,
    "jobs.train.scaling laws": LawsSettings,
    "jobs.eval.bench_engine": BenchEngineSettings,
    "jobs.eval.chat": ChatEvalSettings,
    "jobs.eval.report": ReportSettings,
    "jobs.train.dataset download": DownloadSettings,
    "jobs.train.dataset convert": ConvertSettings,
    "jobs.train.dataset validate": ValidateSettings,
    "jobs.train.dataset list": ListSettings,
}


def anchors(page: Path) -> set[str]:
    """What a heading of a Markdown page can be linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`|[A-Z]+=\S+ )make ([a-z-]+)", page.read_text(), re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("job", JOBS)
def test_every_flag_of_a_job_is_listed_with_its_default(job: str) -> None:
    # A page's last section ends with the page.
    pages = "\n### ".join(
        (ROOT / "docs" / page).read_text() for page in ("training.md", "rl.md", "data.md", "scaling.md", "engine.md")
    )
    section = pages.split(f"### `{job}`")[1].split("\n### ")[0]
    listed = dict(re.findall(r"^\| `(--[a-z0-9-]+)`[^|]* \| ([^|]+) \|", section, re.MULTILINE))
    fields = dataclasses.fields(JOBS[job])
    assert listed == {"--" + field.name.replace("_", "-"): shown(field.default) for field in fields}


def shown(default: Any) -> str:
    """A default as the tables write it."""
    if default is dataclasses.MISSING:
        return "required"
    if default in (None, "", ()):
        return "—"
    if isinstance(default, tuple):
        return ",".join(default)
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:,}" if isinstance(default, int) and default >= 10_000 else str(default)
