"""Evaluate a base model on CORE's 22 in-context tasks: ``python -m jobs.eval.core --model d12``."""

import dataclasses
import logging
from typing import Literal

import torch

from jobs.measures.core.bundle import read_bundle
from jobs.measures.core.download import PUBLIC_BUNDLE, locate_bundle
from jobs.measures.core.run import Result, evaluate_core, table
from jobs.measures.core.scoring import Scorer
from jobs.program import JobSettings, run_program
from jobs.results.evaluations import Evaluation
from jobs.results.metrics import CORE
from nanochat_core.checkpoint import check_model_name, pick_checkpoint
from nanochat_core.device import choose_dtype, prepare_cpu
from nanochat_core.settings import setting
from nanochat_core.store import Store, open_store
from nanochat_core.training.distributed import DEFAULT_TIMEOUT_SECONDS, Ranks, joined, rank_device
from nanochat_core.training.leases import leased

log = logging.getLogger("jobs.eval.core")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoreSettings(JobSettings):
    """Measure CORE (arXiv 2406.11794): the mean centered accuracy over 22 in-context tasks."""

    model: str = setting(help="name of the model in the store")
    stage: Literal["base", "sft", "rl"] = setting("base", "stage whose newest checkpoint is evaluated")
    revision: str = setting("", "<stage>/step_<n>, or promoted, instead of the newest checkpoint of a stage")
    bundle: str = setting(PUBLIC_BUNDLE, "evaluation bundle: a folder, s3://bucket/prefix, or the URL of a zip")
    max_per_task: int = setting(0, "largest number of items of each task to evaluate; 0 evaluates all", minimum=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device to compute on")
    dtype: Literal["auto", "fp32", "bf16"] = setting("auto", "dtype of activations and matrix products")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0, maximum=4096)
    rank_timeout: float = setting(
        DEFAULT_TIMEOUT_SECONDS,
        "seconds after which a rank that does not answer ends the job",
        minimum=1.0,
        maximum=1e7,
    )


def run(settings: CoreSettings, store: Store, device: torch.device, ranks: Ranks) -> Result:
    """Evaluate a checkpoint, store the result, and return the content of ``result.json``.

    If this call evaluates, the ranks after the first return only the fields that the evaluation computes. The items of
    a task are evaluated in parts. Parts that an earlier run finished are not computed again. If a rank dies, the
    finished parts stay in the store.
    """
    checkpoint = pick_checkpoint(store, settings.model, settings.revision, settings.stage)
    bundle = read_bundle(locate_bundle(settings.bundle, store, ranks), settings.max_per_task)
    dtype = choose_dtype(settings.dtype, device)
    decisive = {
        "bundle": bundle.digest,
        "max_per_task": settings.max_per_task,
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
    }
    evaluation = Evaluation.of(store, checkpoint, CORE, decisive)
    # All ranks decide by what the first rank finds in the store. If each rank decided by itself, another program could
    # store the result after one rank has looked for it and before another rank looks, and the ranks would decide
    # differently.
    finished: Result | None = ranks.gather(evaluation.result())[0]
    if finished is not None:
        log.info("already evaluated", extra={"checkpoint": checkpoint.ref.prefix})
        return finished
    if bundle.missing and ranks.leads:
        log.warning("tasks are missing in the bundle", extra={"missing": list(bundle.missing)})
    with leased(store, evaluation.folder, "jobs.eval.core", ranks):
        scorer = Scorer(checkpoint.build_model(device, dtype))
        result = evaluate_core(scorer, checkpoint.tokenizer, bundle, parts=evaluation, ranks=ranks)
        return evaluation.finish(result) if ranks.leads else result


def main(settings: CoreSettings) -> None:
    """Join the other ranks, if there are any, evaluate, and print a table of the tasks."""
    check_model_name(settings.model)
    prepare_cpu(settings.threads)
    store, device = open_store(settings.home), rank_device(settings.device)
    with joined(device, settings.rank_timeout) as ranks:
        result = run(settings, store, device, ranks)
        if ranks.leads:
            print("\n".join(table(result)))


if __name__ == "__main__":
    run_program("jobs.eval.core", "core", CoreSettings, main)
