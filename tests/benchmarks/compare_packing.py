"""Compare how well a small model learns from rows that different rules pack, by held-out bits per byte at equal steps.

Run the program from the project's root:
``python -m tests.benchmarks.compare_packing --data FOLDER --kinds books,code --seeds 1,2,3``.

FOLDER has prose that ``jobs.train.dataset convert`` can read. The kinds of text and the rules are those of
``packing_rules.py``. Every 20th document of a kind is held out, so that small and large sets have the same held-out
text. The training set is a random part of the other documents. All runs of a kind have the same tokenizer, model and
number of steps; runs of one seed have the same initial weights. Bits per byte are measured in two ways. The first way
is as in pretraining: whole documents are cut into rows of the context length. The second way measures only the first
row of each document, because some rules never show the later parts of documents.
"""

import argparse
import itertools
import random
import statistics
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch

from jobs.measures.bits_per_byte import bits_per_byte
from jobs.train.batches.loader import Batch
from jobs.train.loop.kernels import make_trainable
from jobs.train.loop.run import Evaluation, Metrics, RunConfig
from jobs.train.loop.runtime import RunSettings, Runtime
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.trainer import Trainer
from jobs.train.tokenizer import train_tokenizer
from nanochat_core.config import ModelConfig
from nanochat_core.device import prepare_cpu
from nanochat_core.errors import run_main
from nanochat_core.model import GPT
from nanochat_core.store import open_store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, muon_dtype, parameter_groups
from tests.benchmarks.packing_rules import KINDS, RULES, Row, first_characters, texts_of

DEVICE = torch.device("cpu")


def batches(made: Iterator[Row], rows: int) -> Generator[Batch, None, None]:
    while some := list(itertools.islice(made, rows)):
        ids, targets = (torch.from_numpy(np.stack(part).astype(np.int64)) for part in zip(*some, strict=True))
        yield Batch(ids, targets, None)


def first_rows(texts: list[str], tokenizer: Tokenizer, context: int) -> list[str]:
    return [tokenizer.decode(tokenizer.encode(text)[:context]) for text in texts]


def run(
    options: argparse.Namespace, rule: str, seed: int, documents: list[np.ndarray], held_out: list[str], t: Tokenizer
) -> dict[str, float]:
    """Train a model with one packing rule.

    Returns the model's bits per byte on whole held-out documents and on their first rows.
    """
    torch.manual_seed(seed)
    config = ModelConfig.from_depth(
        options.depth, vocab_size=t.vocab_size, head_dim=64, context_length=options.context, window_pattern="L"
    )
    model = GPT(config)
    model.init_weights()
    schedule = Schedule(options.steps, warmup_steps=max(1, min(40, options.steps // 10)))
    settings = RunSettings(
        device_batch_rows=options.rows,
        save_every=0,
        eval_every=0,
        compile=options.compile,
        attention="auto" if options.compile else "sdpa",
    )
    make_trainable(model, settings, DEVICE, "fp32")

    def evaluate() -> Metrics:
        firsts = first_rows(held_out, t, options.context)
        return {name: bits_per_byte(model, t, of) for name, of in (("whole", held_out), ("first", firsts))}

    with tempfile.TemporaryDirectory() as home:
        trainer = Trainer(
            RunConfig("compared", "base", schedule, settings, meta={"settings": {}, "inputs": {}}),
            Runtime(open_store(home), DEVICE, ALONE),
            model,
            t,
            MuonAdamW(
                parameter_groups(model, OptimizerConfig(weight_decay=0.1), batch_lr_scale=options.lr_scale),
                muon_dtype=muon_dtype(DEVICE),
            ),
            open_batches=lambda _: batches(RULES[rule](documents, options.context, options.rows, seed), options.rows),
            evaluations=[Evaluation(evaluate, 0)],
        )
        trainer.run()
    return {name: trainer.state.history[-1][name] for name in ("whole", "first")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of prose")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--rules", default=",".join(RULES))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--characters", type=int, default=8_000_000, help="size of the training set")
    parser.add_argument("--pool-characters", type=int, default=9_000_000, help="text to draw all sets from")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--lr-scale", type=float, default=0.8)
    parser.add_argument("--held-out-characters", type=int, default=400_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    prepare_cpu(options.threads)
    print("| text | rule | bits per byte | of first rows | of each seed |")
    print("| --- | --- | ---: | ---: | --- |")
    for kind in options.kinds.split(","):
        texts = texts_of(kind, options.data, options.pool_characters)
        held_out = list(first_characters(texts[::20], options.held_out_characters))
        others = [text for number, text in enumerate(texts) if text and number % 20]
        random.Random(0).shuffle(others)
        training = list(first_characters(others, options.characters))
        tokenizer = train_tokenizer(training, options.vocab_size)
        documents = [np.array([tokenizer.bos_id, *tokenizer.encode_array(text)], dtype=np.int32) for text in training]
        for rule in options.rules.split(","):
            found = [
                run(options, rule, seed, documents, held_out, tokenizer) for seed in map(int, options.seeds.split(","))
            ]
            whole, first = ([one[name] for one in found] for name in ("whole", "first"))
            each = ", ".join(f"{value:.4f}" for value in whole)
            means = f"{statistics.mean(whole):.4f} | {statistics.mean(first):.4f}"
            print(f"| {kind} | {rule} | {means} | {each} |", flush=True)


if __name__ == "__main__":
    run_main(main, "compare_packing.py")
