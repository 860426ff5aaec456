"""Measure the speed of the data loader and of its parts.

Run the program from the project's root:
``python -m tests.benchmarks.bench_loader HOME DATASET TOKENIZER [THREADS]``.
HOME is an artifact store. The program measures 1, 2, 4, … threads up to THREADS (2 by default). The speeds of
different runs cannot be compared, because other work on the machine changes them.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from jobs.data.shards import TextDataset
from jobs.data.tokenizers import load_tokenizer
from jobs.train.batches.loader import PackedLoader
from jobs.train.batches.sources import TextSource
from nanochat_core.store import open_store

SECONDS = 6.0
# (context length, rows, ranks): a batch of a depth-12 model on one of eight ranks and on one rank, and a batch of a
# small model on a CPU.
SHAPES = ((2048, 256, 8), (2048, 256, 1), (256, 32, 1))


def rate(work: Callable[[int], int], items: Iterable[int], threads: int) -> float:
    """Call ``work`` on each item in ``threads`` threads. Return the sum of the results per second."""
    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        return sum(pool.map(work, items)) / (time.perf_counter() - started)


def main() -> None:
    home, dataset, name, *more = sys.argv[1:]
    store = open_store(home)
    tokenizer = load_tokenizer(store, name)
    text = TextDataset(store, dataset, "train")
    source, texts = TextSource(text, tokenizer), list(text)
    threads = [1 << i for i in range((int(more[0]) if more else 2).bit_length())]
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / len(texts):,.0f} characters each; vocabulary {name}")
    for count in threads:
        encoding = rate(lambda i: len(tokenizer.encode_array(texts[i])), range(len(texts)), count)
        documents = rate(lambda i: len(source.document(i).ids), range(len(texts)), count)
        print(f"{count} threads: tokenizer {encoding:12,.0f} tokens/s, with reading {documents:12,.0f} tokens/s")
    for context, rows, world_size in SHAPES:
        for count in threads:
            loader = PackedLoader(
                source, rows=rows, context_length=context, pad_id=0, world_size=world_size, workers=count
            )
            with contextlib.closing(loader.prefetched()) as batches:
                started = time.perf_counter()
                next(batches)
                filled, processor = time.perf_counter(), time.process_time()
                tokens = 0
                while time.perf_counter() - filled < SECONDS:
                    tokens += next(batches).ids.numel()
                seconds, processor = time.perf_counter() - filled, time.process_time() - processor
            print(
                f"{count} threads, context {context}, {rows} rows on {world_size} ranks: {tokens / seconds:11,.0f} "
                f"tokens/s, {tokens / processor:11,.0f} per second of CPU time; "
                f"first batch after {filled - started:.2f} s"
            )


if __name__ == "__main__":
    main()
