"""The trees in README.md and docs/architecture.md show the folders that exist."""

import re
import subprocess
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "## Where things are", "docs/architecture.md": "## The map"}


def tree(page: str) -> dict[str, str]:
    """The paths of a page's tree, with their comments. The path of a folder ends in a slash."""
    section = (ROOT / page).read_text().split(f"\n{PAGES[page]}\n")[1].split("\n## ")[0]
    block = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert block
    entries: dict[str, str] = {}
    parents: list[str] = []
    for line in block[1].splitlines():
        indent, name, comment = re.fullmatch(r"((?:  )*)(\S+)\s+(\S.*)", line).groups()  # type: ignore[union-attr]
        parents[len(indent) // 2 :] = [name]
        entries["".join(parents)] = comment
    return entries


def folders() -> set[str]:
    """Every folder with a file that git tracks."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {f"{parent}/" for line in listed.stdout.splitlines() for parent in PurePosixPath(line).parents}


@pytest.mark.parametrize("page", PAGES)
def test_everything_named_exists(page: str) -> None:
    for path in tree(page):
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES)
def test_every_folder_beside_a_named_one_is_named(page: str) -> None:
    named = {path for path in tree(page) if path.endswith("/")}
    levels = {path.rsplit("/", 2)[0] for path in named if path.count("/") > 1}
    beside = {folder for folder in folders() if folder.rstrip("/").rpartition("/")[0] in levels}
    assert beside <= named


def test_both_pages_show_the_same_tree() -> None:
    assert tree("README.md") == tree("docs/architecture.md")


@pytest.mark.parametrize("page", PAGES)
def test_top_folders_are_all_named(page: str) -> None:
    top = {folder for folder in folders() if folder.count("/") == 1 and not folder.startswith(".")}
    assert top == {path for path in tree(page) if path.endswith("/") and path.count("/") == 1}


def test_no_two_test_files_have_the_same_name() -> None:
    """Pytest imports a test file by its name alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
