"""The report of a study: its table of results, the fits with their quality, and the missing runs."""

import csv
import dataclasses
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.train.studies.power_laws import fit_power_law
from jobs.train.studies.report import Laws, Miniseries, check_replaceable, render, write_report
from jobs.train.studies.study import Failure, Result
from nanochat_core.formats import NewerFormatError
from nanochat_core.store import open_store

COMMAND = "python -m jobs.train.scaling miniseries --depths 4,6,8"


def result(depth: int, budget: float | None = None, **changes: Any) -> Result:
    size = 10_000 * depth**2
    flops = budget or 72.0 * size**2
    tokens = round(flops / 6 / size)
    known = Result(
        model=f"m-d{depth}",
        depth=depth,
        dim=64 * depth,
        parameters=2 * size,
        scaling_parameters=size,
        batch_tokens=100,
        steps=tokens // 100,
        tokens=tokens,
        flops=flops,
        budget=budget,
        val_bpb=1.0 + 50 / size**0.34 + 50 / tokens**0.28,
        core=None,
        seconds=12.3,
        tokens_per_second=4567.8,
        history=[{"step": 1, "loss": 5.0}, {"step": 2, "skipped": 1.0}, {"step": 3, "loss": 4.0, "val_bpb": 2.0}],
    )
    return dataclasses.replace(known, **changes)


def table(markdown: str) -> list[list[str]]:
    """Cells of each row of the last table."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", markdown, re.MULTILINE)[-1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.strip().splitlines()]


SERIES = [result(depth) for depth in (4, 6, 8)]
SWEEP = [result(depth, budget) for budget in (1e12, 1e13, 1e14) for depth in (2, 4, 8, 16, 32, 64)]


def test_the_table_has_a_row_a_model_under_its_heads() -> None:
    head, _separator, *rows = table(render("mini", COMMAND, Miniseries(SERIES), [], 0))
    assert head == ["model", "depth", "dim", "parameters", "N", "tokens", "FLOPs", "val_bpb", "seconds", "tokens/s"]
    assert {len(row) for row in rows} == {len(head)}
    assert rows[0] == [
        "`m-d4`", "4", "256", "320,000", "160,000", "1,920,000", "1.84e12", f"{SERIES[0].val_bpb:.4f}", "12", "4,568",
    ]  # fmt: skip
    assert [row[1] for row in rows] == ["4", "6", "8"]


def test_core_has_a_column_where_it_was_evaluated() -> None:
    some = [dataclasses.replace(SERIES[0], core=0.1234), *SERIES[1:]]
    head, _separator, *rows = table(render("mini", COMMAND, Miniseries(some), [], 0))
    assert [row[head.index("CORE")] for row in rows] == ["0.1234", "—", "—"]


def test_the_miniseries_says_how_the_loss_falls_and_how_well_that_fits() -> None:
    law = fit_power_law([r.flops for r in SERIES], [r.val_bpb for r in SERIES])
    text = render("mini", COMMAND, Miniseries(SERIES), [], 0)
    assert f"C^{law.exponent:.3f}" in text
    assert f"3 points, R² {law.r2:.4f}, exponent ± {law.exponent_error:.3f}" in text
    assert "give two or more" in render("mini", COMMAND, Miniseries(SERIES[:1]), [], 0)


def test_the_laws_have_their_budgets_exponents_and_what_was_left_out() -> None:
    known = [r for r in SWEEP if not (r.budget == 1e14 and r.depth < 16)]
    findings = Laws(known)
    text = render("laws", COMMAND, findings, [], 0)
    laws = findings.values()["laws"]
    assert f"C^{laws['sizes']['exponent']:.3f} (2 points, R² 1.0000)" in text
    assert f"C^{laws['tokens']['exponent']:.3f}" in text
    size, tokens = findings.values()["budgets"][0]["optimum"]
    assert f"| 1e12 | 6 | {size / 1e3:.4g} k | {tokens / 1e3:.4g} k | {tokens / size:.2f} |" in text
    assert re.search(r"^\| 1e14 \| 3 \| — .*left out: the best size lies outside .* add smaller depths", text, re.M)
    assert "Two budgets" in render("laws", COMMAND, Laws(SWEEP[:6]), [], 0)


def test_failed_and_missing_runs_are_named() -> None:
    text = render("mini", COMMAND, Miniseries(SERIES), [Failure("m-d10", 137)], 2)
    assert "`m-d10` (exit code 137)" in text
    assert "2 runs are still to come" in text
    assert COMMAND in text


@pytest.mark.parametrize("findings", [Miniseries, Laws])
@pytest.mark.parametrize("count", [1, 2, 18])
def test_every_file_is_written_however_little_is_known(tmp_path: Path, findings: Any, count: int) -> None:
    store = open_store(str(tmp_path))
    results = SWEEP[:count]
    write_report(store, "mine", COMMAND, findings(results), [Failure("x", 2)], 1)
    names = ("plot.png", "report.json", "report.md", "table.csv")
    assert store.keys("reports/mine") == [f"reports/mine/{name}" for name in names]
    report = json.loads(store.read("reports/mine/report.json"))
    assert report["format"] == 1
    assert (report["command"], report["failed"]) == (COMMAND, [{"model": "x", "exit_code": 2}])
    rows = list(csv.DictReader(io.StringIO(store.read("reports/mine/table.csv").decode())))
    assert [row["model"] for row in rows] == [run["model"] for run in report["runs"]] == [r.model for r in results]
    assert float(rows[0]["val_bpb"]) == report["runs"][0]["val_bpb"] == results[0].val_bpb
    assert "history" not in rows[0]
    assert not re.search(r"\b(nan|inf|None)\b", store.read("reports/mine/report.md").decode())


def test_a_newer_report_is_not_replaced(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    check_replaceable(store, "mine")
    for content in (b"{}", b"not JSON", b"[]"):  # a report of a version without formats, and damaged reports
        store.write("reports/mine/report.json", content)
        check_replaceable(store, "mine")
    store.write("reports/mine/report.json", b'{"format": 2}')
    with pytest.raises(NewerFormatError, match=r"reports/mine/report\.json has format 2"):
        check_replaceable(store, "mine")
