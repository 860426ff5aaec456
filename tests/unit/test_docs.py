"""The documentation names what exists: files, links, make targets, and every flag of the jobs with its default."""

import re
from pathlib import Path

import pytest

from tests.support import flag_reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def anchors(page: Path) -> set[str]:
    """The anchors of a Markdown page's headings. Links can refer to them."""
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


@pytest.mark.parametrize("way", ["### A chat request", "### A training batch"])
def test_ways_through_the_code_lead_through_at_most_eight_files(way: str) -> None:
    section = (ROOT / "docs/architecture.md").read_text().split(f"\n{way}")[1].split("\n## ")[0].split("\n### ")[0]
    paths = re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)
    assert 5 <= len(paths) <= 8
    for path in paths:
        assert (ROOT / path).is_file(), path
    drawn = re.findall(r"[\w/]+\.py", section.split("```")[1])
    assert len(drawn) == len(paths)
    for label, path in zip(drawn, paths, strict=True):
        assert path.endswith(label), (label, path)


def test_the_page_of_flags_is_made_from_the_programs_settings() -> None:
    assert flag_reference.PAGE.read_text() == flag_reference.page(), "make docs writes the page again"
