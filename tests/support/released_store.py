"""Writes a small store with every kind of artifact: ``python -m tests.support.released_store tests/data/stores/X.zip``.

A release adds the store that it writes to ``tests/data/stores/``. Later versions must still read it.
"""

import datetime
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from jobs.data.shards import write_dataset
from jobs.data.tokenizers import save_tokenizer
from jobs.promotion.decisions import Decision, add_decision
from jobs.promotion.rules import Outcome
from jobs.results.evaluations import Evaluation
from jobs.results.metrics import Metric
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint, promote
from nanochat_core.config import ModelConfig
from nanochat_core.model import GPT
from nanochat_core.store import Store, open_store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint
from nanochat_core.training.optim import Shard

NAME = "old"
TOKENIZER = Tokenizer([*(bytes([i]) for i in range(256)), b"he", b"ll"])
DOCUMENTS = [f"Document {number} says hello." for number in range(40)]
CONFIG = ModelConfig(
    depth=1, dim=16, n_head=1, n_kv_head=1, head_dim=16, context_length=32, vocab_size=TOKENIZER.vocab_size
)
REF = CheckpointRef(NAME, "base", 4)
RUN = {"step": 4, "train_seconds": 1.5, "history": [{"step": 4, "loss": 2.5}], "skipped": [3], "loss_mean": 2.0}
MOMENTUM = torch.arange(6.0).view(3, 2)


def write_store(store: Store) -> None:
    """Writes a dataset, a tokenizer, a promoted base checkpoint, and the results of its evaluation."""
    write_dataset(store, NAME, DOCUMENTS, DOCUMENTS[:4], source="a test")
    store.write(f"data/{NAME}/origin.json", b'{"recipe": "small", "source": "a test"}\n')
    save_tokenizer(store, NAME, TOKENIZER, NAME)
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 5).view(parameter.shape) / 100)
    save_checkpoint(
        store,
        REF,
        model=model,
        tokenizer=TOKENIZER,
        meta={
            "settings": {"dataset": NAME, "tokenizer": NAME},
            "inputs": {},
            "plan": {"batch_tokens": 64, "steps": 4},
            "finished": True,
            "step": 4,
            "dtype": "float32",
            "history": RUN["history"],
        },
        values={"run": RUN},
        shards=[Shard("momentum", MOMENTUM, 0, 3)],
    )
    checkpoint = load_checkpoint(store, REF)
    Evaluation.of(store, checkpoint, "core", {"bundle": "0"}).finish({"core": 0.1, "tasks": {}, "missing": []})
    decision = Decision(
        digest=checkpoint.weights_digest,
        accepted=True,
        outcomes=(Outcome("core.core>=0.05", True, "core.core is 0.1"),),
        metrics={"core.core": Metric(0.1, "0")},
        against="",
        promoted=True,
        time=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC).isoformat(),
    )
    add_decision(store, REF, decision)
    report = {"model": NAME, "revision": REF.revision, "base": {"digest": checkpoint.weights_digest}}
    store.write(f"reports/{NAME}/report.json", (json.dumps(report, indent=2) + "\n").encode())
    promote(store, REF)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(folder)
        write_store(store)
        with zipfile.ZipFile(sys.argv[1], "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file():
                    packed.write(path, path.relative_to(folder))


if __name__ == "__main__":
    main()
