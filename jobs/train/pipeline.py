"""Train a chat model from text and promote it: ``python -m jobs.train.pipeline --recipe demo``.

Each stage runs as a separate process. A stage is skipped if the store has its result already.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Mapping
from typing import Literal

import torch

from jobs.data.local_text import DATA_HELP, TEXT_COLUMN_HELP, VAL_DATA_HELP, LocalText, local_text
from jobs.data.origin import read_origin, write_origin
from jobs.data.shards import TextDataset, dataset_digest, read_manifest, shard_keys
from jobs.data.tokenizers import load_tokenizer, trained_on
from jobs.program import JobSettings, command_line, run_program
from jobs.promotion.decisions import latest_decision
from jobs.promotion.gate import EXIT_REFUSED, decide
from jobs.recipes import RECIPES, Flags, Recipe
from jobs.results.reports import is_reported
from jobs.tasks.registry import open_problems
from jobs.tasks.task import Problems
from jobs.train import pretrain, rl, sft
from jobs.train.batches.mixtures import Mixture
from jobs.train.launcher import Launcher
from jobs.train.loop.run import differences
from nanochat_core.checkpoint import Checkpoint, check_model_name, newest_checkpoint, promoted
from nanochat_core.errors import UserError
from nanochat_core.settings import setting
from nanochat_core.store import Lease, Store, open_store

log = logging.getLogger("jobs.train.pipeline")

# Bytes of text that are enough for every recipe; counting stops there.
_LONG_TEXT = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineSettings(JobSettings):
    """Run every stage of a recipe: data, tokenizer, training, evaluation, report, promotion."""

    recipe: Literal["demo", "small", "speedrun"] = setting(
        help="; ".join(f"{r.name}: {r.summary}" for r in RECIPES.values())
    )
    model: str = setting("", "name of the model in the store; the recipe's name by default")
    data: str = setting("", DATA_HELP)
    val_data: str = setting("", VAL_DATA_HELP)
    text_column: str = setting("text", TEXT_COLUMN_HELP)
    rl: bool = setting(False, "also train the fine-tuned model by reinforcement learning on the recipe's task")
    start_over: bool = setting(
        False, "train stages again whose inputs have changed; this deletes their earlier checkpoints"
    )
    ranks: int = setting(
        0, "processes that train together on this machine; 0 starts one for each GPU", minimum=0, maximum=1024
    )
    threads: int = setting(
        0, "CPU threads of the training stages; 0 leaves the choice to torch", minimum=0, maximum=4096
    )


class Pipeline:
    """Runs the stages of one recipe for one model.

    A stage is done if the store has a result of the stage that was made from the current inputs. So if a stage is
    trained again and its result changes, all later stages are trained again too.
    """

    def __init__(self, settings: PipelineSettings, recipe: Recipe) -> None:
        """Raises UserError if the settings ask for reinforcement learning and the recipe has no task for it."""
        self.settings, self.recipe = settings, recipe
        self.model = check_model_name(settings.model or recipe.name)
        self.store: Store = open_store(settings.home)
        self._launcher = Launcher()
        self._threads: Flags = {"threads": settings.threads} if settings.threads else {}
        if settings.rl and recipe.rl is None:
            raise UserError(f"recipe {recipe.name} has nothing to practise; leave --rl out")

    def run(self) -> None:
        """Run all stages that are not done yet.

        If a stage fails or is stopped, raises SystemExit with the stage's exit code. If the gate refuses the model,
        raises SystemExit with EXIT_REFUSED.
        """
        self._launcher.forward_signals()
        started = time.monotonic()
        self._prepare()
        stages = self._train()
        final = stages[-1]
        if not is_reported(self.store, self.model, *stages):
            wanted = {"model": self.model, "revision": final.ref.revision, "recipe": self.recipe.name}
            self._stage("jobs.eval.report", {**wanted, **self._threads})
        self._promote(final)
        log.info(
            "pipeline done",
            extra={
                "model": self.model,
                "promoted": final.ref.revision,
                "checkpoint": f"{self.store}/{final.ref.prefix}",
                "report": self._report,
                "next": [command_line("deploy.local", model=self.model, home=self.settings.home)],
                "seconds": round(time.monotonic() - started, 1),
            },
        )

    @property
    def _report(self) -> str:
        """Path of the model's report."""
        return f"{self.store}/reports/{self.model}/report.md"

    def _promote(self, tuned: Checkpoint) -> None:
        """Promote the model if it passes the recipe's gate. Otherwise the earlier promotion stays in force."""
        last = latest_decision(self.store, tuned.ref, tuned.weights_digest)
        if last is not None and last.promoted and promoted(self.store, self.model) == tuned.ref:
            return
        decision = decide(self.store, tuned, self.recipe.gate, promoting=True)
        if not decision.accepted:
            log.error(
                "not promoted",
                extra={
                    "model": self.model,
                    "revision": tuned.ref.revision,
                    "reasons": decision.refusals,
                    "checkpoint": f"{self.store}/{tuned.ref.prefix}",
                    "report": self._report,
                },
            )
            raise SystemExit(EXIT_REFUSED)

    def _prepare(self) -> None:
        """Put the recipe's data into the store, unless the store has them.

        Raises UserError if the store has other data under the model's name.
        """
        if self.settings.rl:
            self._problems()  # Missing problems must be an error now, not after hours of training.
        settings = self.settings
        data: LocalText | None = None
        if settings.data:
            data = local_text(settings.data, settings.val_data, settings.text_column)
        elif settings.val_data:
            raise UserError("--val-data is the validation text beside --data; give --data too")
        given = {"recipe": self.recipe.name}
        if data is not None and self.recipe.needs_data:
            given["text"] = data.digest
        self._has_data(given)  # If the model has other data, this raises an error before a download.
        if data is None and self.recipe.web_shards and self._lacks_text():
            wanted = {"dataset": self.model, "shards": self.recipe.web_shards}
            self._stage("jobs.train.dataset", wanted, subcommand="download")
        with Lease(self.store, f"data/{self.model}", "jobs.train.pipeline"):
            has_data = self._has_data(given)  # Another pipeline may have made the data meanwhile.
            self.recipe.prepare(self.store, self.model, data)
            if not has_data:
                origin = given | ({"source": str(data.data.resolve())} if data else {})
                write_origin(self.store, self.model, origin)

    def _has_data(self, given: Mapping[str, str]) -> bool:
        """Whether a pipeline has made the model's data. Raises UserError if their origin differs from ``given``."""
        stored = read_origin(self.store, self.model)
        if stored is not None and given != {name: stored.get(name) for name in given}:
            source = f" from {stored['source']}" if "source" in stored else ""
            raise UserError(
                f"data/{self.model} in {self.store} was made with recipe {stored.get('recipe')}{source}, not with what "
                f"was given now; use another --model name, or delete data/{self.model} and data/{self.model}-chat and "
                f"give --start-over to train {self.model} anew"
            )
        return stored is not None

    def _lacks_text(self) -> bool:
        """Whether the store has no shards, or only the shards of an interrupted download."""
        manifest = read_manifest(self.store, self.model)
        return not shard_keys(self.store, self.model) if manifest is None else not manifest.complete

    def _train(self) -> list[Checkpoint]:
        """Train all stages whose final checkpoints are not current; returns the final checkpoint of each stage."""
        name, conversations = self.model, f"{self.model}-chat"
        trained, dataset = trained_on(self.store, name), dataset_digest(self.store, name)
        if trained is not None and trained != dataset and not self.settings.start_over:
            raise UserError(
                f"tokenizers/{name} in {self.store} was trained on another dataset than data/{name} of now; give "
                "--start-over to train it and the model again, or use another --model name"
            )
        if trained != dataset:
            self._stage("jobs.train.tokenizer", {"dataset": name, "name": name, **self.recipe.tokenizer})
        fitted = self.recipe.fitted(TextDataset(self.store, name, "train").bytes_up_to(_LONG_TEXT))
        flags: Flags = {"dataset": name, "tokenizer": name, **fitted.pretrain}
        inputs = pretrain.input_digests(self.store, name, load_tokenizer(self.store, name))
        base = self._checkpoint("base", pretrain.__name__, flags, inputs)
        flags = {"mixture": conversations, **self.recipe.sft}
        inputs = sft.input_digests(base, Mixture(self.store, conversations))
        tuned = self._checkpoint("sft", sft.__name__, flags, inputs)
        if not self.settings.rl:
            return [base, tuned]
        inputs = rl.input_digests(tuned, self._problems())
        return [base, tuned, self._checkpoint("rl", rl.__name__, self.recipe.rl or {}, inputs)]

    def _problems(self) -> Problems:
        return open_problems(self.store, str((self.recipe.rl or {})["task"]), held_out=1)

    def _checkpoint(self, stage: str, module: str, flags: Flags, inputs: Mapping[str, str]) -> Checkpoint:
        """Train a stage from ``inputs`` unless its final checkpoint is current; returns this checkpoint."""
        newest = newest_checkpoint(self.store, self.model, stage)
        stale = newest is not None and newest.meta.get("inputs") != inputs
        if newest is None or stale or not newest.meta["finished"]:
            if newest is not None and stale:
                changed = ", ".join(differences({"inputs": newest.meta.get("inputs", {})}, {"inputs": inputs}))
                if not self.settings.start_over:
                    raise UserError(
                        f"{newest.ref.prefix} in {self.store} was made from other inputs ({changed}); give "
                        "--start-over to delete it and train the stage again, or use another --model name"
                    )
                log.info("starting over", extra={"stage": module, "reason": changed})
            flags = {"model": self.model, **self._threads, **flags}
            self._stage(module, flags, start_over=stale, ranks=self.settings.ranks or max(1, torch.cuda.device_count()))
            newest = newest_checkpoint(self.store, self.model, stage)
        if newest is None or not newest.meta["finished"]:
            raise UserError(f"{module} left no finished checkpoint of {self.model}")
        return newest

    def _stage(
        self, module: str, flags: Flags, *, subcommand: str = "", start_over: bool = False, ranks: int = 1
    ) -> None:
        """Run one stage as a process to its end. Its output goes to the output of this process."""
        command = [sys.executable, "-m", module, *filter(None, [subcommand]), "--home", self.settings.home]
        for name, value in flags.items():
            command += [f"--{name}", str(value)]
        if start_over:
            command.append("--no-resume")
        log.info("stage starts", extra={"stage": module})
        started = time.monotonic()
        code = self._launcher.run(command, ranks)
        if code:
            log.error("stage ended early", extra={"stage": module, "exit_code": code})
            raise SystemExit(code)
        log.info("stage done", extra={"stage": module, "seconds": round(time.monotonic() - started, 1)})


if __name__ == "__main__":
    run_program("jobs.train.pipeline", "pipeline", PipelineSettings, lambda s: Pipeline(s, RECIPES[s.recipe]).run())
