"""``make bench`` finds every ratio that the programs print, and shows which of them were skipped or failed."""

import pytest

from tests.benchmarks.speed import BENCHMARKS, ROOT, Benchmark, Outcome, page, ratios

TABLE = """
round 1: single      peer     269, ours     657 tokens/s

| case | peer, tokens/s | ours, tokens/s | ratio |
| --- | ---: | ---: | ---: |
| single | 269 | 657 | 2.44 |
| samples-8 | 1,156 | 2,333 | 2.02 |

greedy tokens: the same on both sides
"""
TRAINING = """
peer: median 3211 tokens/s, 62.1% of 140 GFLOP/s
ours: median 4553 tokens/s, 88.0% of 140 GFLOP/s
ratio of the medians: 1.418
"""
PEER, TRAIN, LOAD = (
    Benchmark("engine", "engine.md", "tests.benchmarks.bench_engine_peer --peer {peer}"),
    Benchmark("training", "upstream.md", "tests.benchmarks.bench_train_peer"),
    Benchmark("gateway", "gateway.md", "tests.benchmarks.bench_gateway"),
)


def test_ratios_are_the_last_columns_of_tables_and_those_in_sentences() -> None:
    assert ratios(TABLE) == [("single", "2.44"), ("samples-8", "2.02")]
    assert ratios(TRAINING) == [("", "1.418")]
    assert ratios("first token after 3 ms, without 10 ms, ratio of the medians 3.46") == [("", "3.46")]
    assert ratios("| spins | times slower |\n| --- | ---: |\n| 100 | 1.5 |") == []


def test_the_page_has_ratios_shares_and_what_was_not_measured() -> None:
    outcomes: dict[str, Outcome | str] = {
        "engine": Outcome(TABLE, 0, 61.0, 0.1),
        "training": Outcome(TRAINING, 1, 30.0, 2.5),
        "gateway": "skipped: give --peer",
    }
    lines = page("AMD EPYC, family 25", "torch 2.9", outcomes, (PEER, TRAIN, LOAD)).splitlines()
    assert "| engine | single | 2.44 |  | 61 s | 0.1 |" in lines
    assert "| engine | samples-8 | 2.02 |  |  |  |" in lines
    assert "| training |  | failed with 1 | 88.0% of 140 GFLOP/s | 30 s | 2.5 |" in lines
    assert "| training |  | 1.418 |  |  |  |" in lines
    assert "| gateway |  | skipped: give --peer |  |  |  |" in lines
    assert "greedy tokens: the same on both sides" in lines


def test_a_benchmark_needs_the_flags_in_its_command() -> None:
    assert PEER.needs() == {"peer"}
    assert TRAIN.needs() == set()


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: str(benchmark.name))
def test_the_documentation_names_the_program(benchmark: Benchmark) -> None:
    module = benchmark.command.split()[0]
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert module in (ROOT / "docs" / benchmark.page).read_text()
