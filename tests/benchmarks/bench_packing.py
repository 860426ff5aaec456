"""For four kinds of text and four rules of packing, measure the speed, and how much text is never shown or repeated.

Run the program from the project's root: ``python -m tests.benchmarks.bench_packing --data FOLDER``. FOLDER has prose
that ``jobs.train.dataset convert`` can read. The kinds of text and the rules are those of ``packing_rules.py``. A token
stands for four characters. The program takes a few minutes on one core. The columns of the table are:

- the share of the documents that were never shown, and the share that was only partly shown;
- the share of the tokens that were never a target;
- the share of the targets that are repetitions beyond one per pass;
- the speed without tokenizing, of the rule alone or of this project's whole loader.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nanochat_core.errors import run_main
from nanochat_core.model import IGNORE_INDEX
from tests.benchmarks.packing_rules import CHARACTERS_PER_TOKEN, KINDS, RULES, Rule, texts_of

BOS = 0


def numbered(lengths: Sequence[int]) -> list[np.ndarray]:
    """Create one document for each length: BOS and that many further tokens. No token except BOS occurs twice."""
    starts = itertools.accumulate(lengths, initial=1)
    return [
        np.concatenate([[BOS], np.arange(start, start + length)]).astype(np.int32)
        for start, length in zip(starts, lengths, strict=False)
    ]


def measure(documents: list[np.ndarray], rule: Rule, context: int, rows: int, passes: int) -> str:
    """Return a row of the table.

    The rule packs as many rows as ``passes`` epochs of the documents would fill without loss or repetition.
    """
    bounds = np.cumsum([1, *(len(document) - 1 for document in documents)])
    count = round(passes * (bounds[-1] + len(documents)) / context)
    shown = np.zeros(bounds[-1], dtype=np.int64)
    made = rule(documents, context, rows, 1)
    started = time.perf_counter()
    for _, targets in itertools.islice(made, count):
        shown[targets[targets != IGNORE_INDEX]] += 1
    seconds = time.perf_counter() - started
    shown[BOS] = 0
    tokens = shown[1:]
    seen = np.add.reduceat(tokens > 0, bounds[:-1] - 1)
    lengths = np.diff(bounds)
    never = (seen == 0).mean()
    parts = (never, (seen < lengths).mean() - never, (tokens == 0).mean())
    repeated = np.maximum(tokens - passes, 0).sum() / tokens.sum()
    return " | ".join([*(f"{part:.1%}" for part in parts), f"{repeated:.1%}", f"{count / seconds:,.0f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of prose")
    parser.add_argument("--characters", type=int, default=24_000_000, help="largest size of a set")
    parser.add_argument("--contexts", default="256,2048")
    parser.add_argument("--passes", default="1,3")
    parser.add_argument("--rows", type=int, default=32, help="rows in a batch")
    options = parser.parse_args()
    print("| text | documents | context | passes | rule | never | in part | tokens unseen | repeated | rows/s |")
    print("| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    for kind in KINDS:
        texts = texts_of(kind, options.data, options.characters)
        documents = numbered([max(1, len(text) // CHARACTERS_PER_TOKEN) for text in texts])
        for context, passes in itertools.product(*(map(int, o.split(",")) for o in (options.contexts, options.passes))):
            for name, rule in RULES.items():
                figures = measure(documents, rule, context, options.rows, passes)
                print(f"| {kind} | {len(documents):,} | {context} | {passes} | {name} | {figures} |", flush=True)


if __name__ == "__main__":
    run_main(main, "bench_packing.py")
