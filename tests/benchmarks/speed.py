"""Repeat all measurements of speed in the documentation, one after another, and write one page with all ratios.

Run the program from the project's root: ``make bench``, or ``python -m tests.benchmarks.speed``. It starts the other
programs in this folder, each of which measures both sides in alternating runs. The page and the whole outputs are
written to ``--output`` after each program, so a run that is cut off leaves what it has measured. Programs that lack a
checkout or package of another project are skipped, and the page says which flag they need.

The exit code is 1 if a program failed, and also if two sides that should give equal results do not.
"""

import argparse
import dataclasses
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from string import Formatter

from jobs.markdown import block, code, duration, table
from jobs.measures.machine import describe_machine

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """One program.

    Attributes:
        page: the page of the documentation that has its results, below ``docs/``.
        command: the module and its flags. A name in braces stands for the flag of this program with the same name; the
            benchmark is skipped if that flag is not given.
        quick: whether it is also a part of the quick run, which takes less than two minutes.
    """

    name: str
    page: str
    command: str
    quick: bool = False

    def needs(self) -> set[str]:
        """The names of the flags that the command needs."""
        return {name for _, name, _, _ in Formatter().parse(self.command) if name}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a benchmark printed, how long it took, and the machine's load (running processes) before it started."""

    output: str
    code: int
    seconds: float
    load: float


BENCHMARKS = (
    Benchmark("matrix products", "experiments.md", "tests.benchmarks.bench_cpu", quick=True),
    Benchmark(
        "engine, fp32, beside karpathy/nanochat",
        "engine.md",
        "tests.benchmarks.bench_engine_peer --peer {peer} --dtype fp32 --rounds {rounds}",
    ),
    Benchmark(
        "engine, bf16, beside karpathy/nanochat",
        "engine.md",
        "tests.benchmarks.bench_engine_peer --peer {peer} --dtype bf16 --rounds {rounds}",
    ),
    Benchmark(
        "engine beside transformers",
        "engine.md",
        "tests.benchmarks.bench_engine_transformers --transformers {transformers} --rounds {rounds}",
    ),
    Benchmark(
        "engine at depth 12 and the machine's limits",
        "engine.md",
        "jobs.eval.bench_engine --depth 12 --vocab-size 32768 --device cpu --mixes fixed --batch-sizes 1,8 "
        "--log-level warning --output {output}/engine",
    ),
    Benchmark("second turn of a conversation", "engine.md", "tests.benchmarks.bench_second_turn", quick=True),
    Benchmark("eight-bit weights", "engine.md", "tests.benchmarks.bench_int8 --rounds {rounds}"),
    Benchmark("a busy neighbor", "engine.md", "tests.benchmarks.bench_neighbor --rounds {rounds}"),
    Benchmark(
        "training, fp32, beside karpathy/nanochat",
        "upstream.md",
        "tests.benchmarks.bench_train_peer --peer {peer} --dtype fp32 --window-pattern SSSL --rounds {rounds} "
        "--seconds {seconds}",
    ),
    Benchmark(
        "training, bf16, beside karpathy/nanochat",
        "upstream.md",
        "tests.benchmarks.bench_train_peer --peer {peer} --dtype bf16 --window-pattern SSSL --rounds {rounds} "
        "--seconds {seconds}",
    ),
    Benchmark(
        "rollouts beside karpathy/nanochat", "rl.md", "tests.benchmarks.bench_rollouts_peer --peer {peer} --rounds 2"
    ),
    Benchmark(
        "CORE beside karpathy/nanochat",
        "evaluation.md",
        "tests.benchmarks.bench_core_peer --peer {peer} --bundle {bundle} --max-per-task 40 --threads 1 --steps 40",
    ),
    Benchmark("attention", "experiments.md", "tests.benchmarks.bench_attention"),
    Benchmark("loss", "experiments.md", "tests.benchmarks.bench_loss"),
    Benchmark("sandbox", "sandbox.md", "tests.benchmarks.bench_sandbox --calls 100", quick=True),
    Benchmark("gateway", "gateway.md", "tests.benchmarks.bench_gateway --rounds {rounds}"),
    Benchmark("routing", "routing.md", "tests.benchmarks.bench_routing"),
)

_RATIO = re.compile(r"ratio of the medians:? ([\d.]+)")
_SHARE = re.compile(r"ours: .* ([\d.]+%) of (\d+ GFLOP/s)")


def ratios(output: str) -> list[tuple[str, str]]:
    """The ratios in a program's output, each with its case: the last columns of tables, and ratios in sentences."""
    found, in_table = list[tuple[str, str]](), False
    for line in output.splitlines():
        if not line.startswith("|"):
            in_table = False
            found += [("", match[1]) for match in _RATIO.finditer(line)]
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[-1] == "ratio":
            in_table = True
        elif in_table and not set(cells[-1]) <= set("-:"):
            found.append((cells[0], cells[-1]))
    return found


def page(machine: str, versions: str, outcomes: dict[str, Outcome | str], benchmarks: Iterable[Benchmark]) -> str:
    """The page as Markdown; an outcome that is a string says why the benchmark was skipped."""
    rows, details = [], []
    for benchmark in benchmarks:
        outcome = outcomes.get(benchmark.name, "not run yet")
        if isinstance(outcome, str):
            rows.append((benchmark.name, "", outcome, "", "", ""))
            continue
        share = _SHARE.search(outcome.output)
        limit = f"{share[1]} of {share[2]}" if share else ""
        found = ratios(outcome.output) or [("", "see below")]
        state = [] if outcome.code == 0 else [("", f"failed with {outcome.code}")]
        for number, (case, ratio) in enumerate([*state, *found]):
            once = (limit, duration(outcome.seconds), f"{outcome.load:.1f}") if not number else ("", "", "")
            rows.append((benchmark.name, case, ratio, *once))
        details += [f"## {benchmark.name[0].upper()}{benchmark.name[1:]}", "", *block(outcome.output.strip()), ""]
    header = ("Measurement", "case", "ratio", "share of the limit", "time", "load before")
    return "\n".join(["# Speed", "", f"{machine}. {versions}.", "", *table(header, rows), "", *details])


def processor() -> str:
    """The processor's name; a name such as "AMD EPYC" stands for many processors, so family and model are added."""
    name = str(describe_machine()["processor"])
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return name
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = [f"{word} {fields[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in fields]
    return ", ".join([name, *numbers])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="checkout of karpathy/nanochat")
    parser.add_argument("--transformers", default="", help="folder with the package transformers")
    parser.add_argument("--bundle", default="", help="folder of an evaluation bundle, for CORE")
    parser.add_argument("--rounds", default="3", help="rounds of each measurement")
    parser.add_argument("--seconds", default="15", help="timed seconds of one training run")
    parser.add_argument("--only", default="", help="run only benchmarks whose names contain this text")
    parser.add_argument("--quick", action="store_true", help="run only what takes less than two minutes in total")
    parser.add_argument("--output", default="build/speed", help="folder for the page and the outputs")
    options = parser.parse_args()
    chosen = [each for each in BENCHMARKS if options.only in each.name and (each.quick or not options.quick)]
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "speed.md"
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    versions = f"Python {platform.python_version()}, torch {describe_machine()['torch']}"
    outcomes: dict[str, Outcome | str] = {}
    for benchmark in chosen:
        missing = sorted(name for name in benchmark.needs() if not getattr(options, name))
        if missing:
            outcomes[benchmark.name] = f"skipped: give {', '.join(f'--{name}' for name in missing)}"
        else:
            words = [word.format_map(vars(options)) for word in benchmark.command.split()]
            print(f"{benchmark.name}: {code(' '.join(words))}", file=sys.stderr, flush=True)
            outcomes[benchmark.name] = outcome = _run(words)
            (folder / f"{re.sub('[^a-z0-9]+', '-', benchmark.name.lower())}.txt").write_text(outcome.output)
        written.write_text(page(machine, versions, outcomes, chosen), encoding="utf-8")
    print(written.read_text(encoding="utf-8"))
    return int(any(isinstance(outcome, Outcome) and outcome.code for outcome in outcomes.values()))


def _run(words: list[str]) -> Outcome:
    load, started = os.getloadavg()[0], time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return Outcome(done.stdout, done.returncode, time.perf_counter() - started, load)


if __name__ == "__main__":
    raise SystemExit(main())
