"""Evaluate CORE with this project. ``bench_core_peer.py`` starts this program for its own side of the comparison."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

from jobs.measures.core.bundle import open_bundle, read_bundle
from jobs.measures.core.run import core_result, evaluate_core
from jobs.measures.core.scoring import Scorer
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.device import prepare_cpu
from nanochat_core.store import open_store


def core(task: dict[str, Any]) -> None:
    """Evaluate CORE task by task, as jobs.eval.core does. Write the seconds and the accuracy of each task."""
    prepare_cpu(task["threads"])
    checkpoint = load_checkpoint(open_store(task["home"]), CheckpointRef(task["model"], "base", 1))
    model = checkpoint.build_model()
    began = time.perf_counter()
    bundle = read_bundle(open_bundle(task["bundle"]), task["max_per_task"])
    scorer = Scorer(model)
    tasks, results = {}, dict[str, Any]()
    for each in bundle.tasks:
        started = time.perf_counter()
        result = evaluate_core(scorer, checkpoint.tokenizer, dataclasses.replace(bundle, tasks=(each,)))["tasks"]
        tasks[each.label] = {
            "accuracy": result[each.label]["accuracy"],
            "seconds": time.perf_counter() - started,
            "examples": result[each.label]["answers"],
        }
        results |= result
    whole = time.perf_counter() - began
    summary = {"core": core_result(results, bundle.missing)["core"], "seconds": whole, "tasks": tasks}
    Path(task["result"]).write_text(json.dumps(summary))


if __name__ == "__main__":
    core(json.loads(Path(sys.argv[1]).read_text()))
