"""Train a chat model from text and promote it: ``python -m jobs.train.pipeline --recipe demo``.

Each stage runs as a separate process or, in a cluster, in pods of its own. A stage is skipped if the store has its
result already.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Literal

import torch

from jobs import demo_world
from jobs.data.local_text import DATA_HELP, TEXT_COLUMN_HELP, VAL_DATA_HELP, LocalText, local_text
from jobs.data.origin import read_origin, write_origin
from jobs.data.shards import TextDataset, dataset_digest, read_manifest, shard_keys
from jobs.data.tokenizers import load_tokenizer, trained_on
from jobs.program import JobSettings, command_line, run_program
from jobs.promotion.decisions import latest_decision
from jobs.promotion.gate import decide
from jobs.recipes import RECIPES, Flags, Recipe
from jobs.results.metrics import ancestors
from jobs.results.reports import is_reported
from jobs.tasks.registry import open_problems
from jobs.tasks.task import Problems
from jobs.train import pretrain, rl, sft
from jobs.train.batches.mixtures import Mixture
from jobs.train.launcher import Launcher
from jobs.train.loop.run import differences
from jobs.train.stages import Place, Runner, StageRun
from jobs.train.story import Story
from nanochat_core.checkpoint import (
    LESSON,
    Checkpoint,
    check_model_name,
    load_checkpoint,
    newest_checkpoint,
    promoted,
)
from nanochat_core.errors import EXIT_REFUSED, UserError
from nanochat_core.settings import setting
from nanochat_core.store import Lease, Store, open_store

log = logging.getLogger("jobs.train.pipeline")

# A text with this many bytes is long enough for every recipe, so counting the bytes of a text stops at this number.
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
    unless_promoted: bool = setting(False, "do nothing if a revision of the model is promoted already")
    ranks: int = setting(
        0, "processes that train together on one machine; 0 starts one for each GPU", minimum=0, maximum=1024
    )
    threads: int = setting(
        0, "CPU threads of training and of the report; 0 leaves the choice to torch", minimum=0, maximum=4096
    )
    on: Literal["local", "kubernetes"] = setting(
        "local", "runner of the stages: processes of this machine, or PyTorchJobs of the cluster that runs this program"
    )
    nodes: int = setting(1, "with --on kubernetes, number of pods that pretrain together", minimum=1, maximum=4096)
    retries: int = setting(
        5,
        "with --on kubernetes, further attempts of a stage that was preempted and made no new checkpoint",
        minimum=0,
        maximum=1000,
    )
    job: str = setting(
        "", "with --on kubernetes, namespace/name/uid of the Job that runs this program; the Job's manifest sets it"
    )


class Processes:
    """Runs each stage as processes of this machine. The output of a stage goes to the output of this process."""

    def __init__(self, ranks: int = 0) -> None:
        """``ranks`` is the number of processes that train together; 0 starts one for each GPU."""
        self._launcher = Launcher((pretrain.__name__, sft.__name__, "jobs.eval.report"))
        self._ranks = ranks

    def forward_signals(self) -> None:
        self._launcher.forward_signals()

    def settle(self) -> None:
        """Does nothing: SIGTERM, SIGINT and SIGHUP end the running stage before they end the pipeline.

        If the pipeline was killed, its stage may still run. The lease of that stage then makes a second run of the
        stage end with an error before it writes.
        """

    def run(self, stage: StageRun) -> int:
        trains = stage.place in ("node", "nodes")
        ranks = (self._ranks or max(1, torch.cuda.device_count())) if trains else 1
        # On a terminal, Story reports the stages, so the stages' own log events of level info are left out.
        quiet = ["--log-level", "warning"] if sys.stderr.isatty() else []
        return self._launcher.run([sys.executable, "-m", *stage.arguments(), *quiet], ranks)

    def announce(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Does nothing, because the pipeline's own log reports the event."""


class Pipeline:
    """Runs the stages of one recipe for one model.

    A stage is done if the store has a result of the stage that was made from the current inputs. So if a stage is
    trained again and its result changes, all later stages must be trained again too.
    """

    def __init__(self, settings: PipelineSettings, recipe: Recipe, runner: Runner | None = None) -> None:
        """Raises UserError if the settings ask for reinforcement learning and the recipe has no task for it.

        ``runner`` runs the stages; None chooses the runner from the settings.
        """
        self.settings, self.recipe = settings, recipe
        self.model = check_model_name(settings.model or recipe.name)
        self.store: Store = open_store(settings.home)
        self._runner: Runner = runner or _runner(settings)
        self._threads: Flags = {"threads": settings.threads} if settings.threads else {}
        if settings.rl and recipe.rl is None:
            raise UserError(f"recipe {recipe.name} has nothing to practice; leave --rl out")
        stages = ["data", "tokenizer", "base", "sft", *(["rl"] if settings.rl else []), "report"]
        self._story = Story(self.store, self.model, recipe.name, stages)

    def run(self) -> None:
        """Run all stages that are not done yet.

        With ``unless_promoted``, does nothing if a revision of the model is promoted, whatever it was made from. If a
        stage fails or is stopped, raises SystemExit with the stage's exit code. If the gate refuses the model, raises
        SystemExit with EXIT_REFUSED.
        """
        self._runner.forward_signals()
        if self.settings.unless_promoted and (ref := promoted(self.store, self.model)) is not None:
            log.info("nothing to do", extra={"model": self.model, "promoted": ref.revision})
            return
        started = time.monotonic()
        self._runner.settle()
        self._prepare()
        stages = self._train()
        final = stages[-1]
        if not is_reported(self.store, self.model, *stages):
            wanted = {"model": self.model, "revision": final.ref.revision, "recipe": self.recipe.name}
            inputs = {stage.ref.stage: stage.weights_digest for stage in stages}
            self._stage(
                "report",
                "jobs.eval.report",
                {**wanted, **self._threads},
                place="evaluation",
                inputs=inputs,
                done=lambda: is_reported(self.store, self.model, *stages),
            )
        self._promote(final)
        self._story.end("promoted")
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
        """Promote the model if it passes the recipe's gate.

        Otherwise, the earlier promotion stays in force, and the pipeline ends with EXIT_REFUSED.
        """
        last = latest_decision(self.store, tuned.ref, tuned.weights_digest)
        if last is not None and last.promoted and self._is_served(tuned):
            return
        decision = decide(self.store, tuned, self.recipe.gate, promoting=True)
        if decision.accepted:
            self._runner.announce("Promoted", f"{self.model} {tuned.ref.revision} is promoted")
        else:
            refusals = "; ".join(decision.refusals)
            self._runner.announce("NotPromoted", f"{self.model} {tuned.ref.revision}: {refusals}", warning=True)
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
            self._story.end("refused")
            raise SystemExit(EXIT_REFUSED)

    def _is_served(self, tuned: Checkpoint) -> bool:
        """Whether the promoted checkpoint is ``tuned``, or was made from ``tuned`` by lessons.

        In the second case, promoting ``tuned`` would undo the lessons.
        """
        current = promoted(self.store, self.model)
        if current is None or current.stage != LESSON:
            return current == tuned.ref
        made_from = ancestors(self.store, load_checkpoint(self.store, current))
        return any(digest == tuned.weights_digest for digest, _ in made_from)

    def _prepare(self) -> None:
        """Put the recipe's data into the store, unless the store has them.

        Raises UserError if the store has other data under the model's name, or if data that the recipe needs are
        missing.
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
        if not self.recipe.needs_data:
            given["version"] = str(demo_world.VERSION)
        elif data is not None:
            given["text"] = data.digest
        self._has_data(given)  # If the model has other data, this raises an error before a download.
        if data is None and self.recipe.web_shards and self._lacks_text():
            wanted = {"dataset": self.model, "shards": self.recipe.web_shards}
            self._stage(
                "data",
                "jobs.train.dataset",
                wanted,
                place="data",
                subcommand="download",
                done=lambda: not self._lacks_text(),
            )
        with Lease(self.store, f"data/{self.model}", "jobs.train.pipeline"):
            # The store is asked again, because another pipeline may have made the data meanwhile.
            if self._has_data(given):
                self.recipe.prepare(self.store, self.model, data)
                return
            with self._story.stage("data", "data"):
                self.recipe.prepare(self.store, self.model, data)
            origin = given | ({"source": str(data.data.resolve())} if data else {})
            write_origin(self.store, self.model, origin)

    def _has_data(self, given: Mapping[str, str]) -> bool:
        """Whether a pipeline has made the model's data.

        ``given`` has the name of the recipe, and the digest of the user's text or the version of the demo world, from
        which the data are made. Raises UserError if the stored data were made with another recipe, from another text or
        from another version.
        """
        stored = read_origin(self.store, self.model)
        if stored is not None and given != {name: stored.get(name) for name in given}:
            recipe = stored.get("recipe")
            source = f" from {stored['source']}" if "source" in stored else ""
            made = f"with recipe {recipe}{source}, not with the recipe or text given now"
            if recipe == given["recipe"] and "version" in given:
                made = f"by another version of recipe {recipe}"
            raise UserError(
                f"data/{self.model} in {self.store} was made {made}; use another --model name, or delete "
                f"data/{self.model} and data/{self.model}-chat and give --start-over to train {self.model} anew"
            )
        return stored is not None

    def _lacks_text(self) -> bool:
        """Whether the store has no shards, or only the shards of an interrupted download."""
        manifest = read_manifest(self.store, self.model)
        return not shard_keys(self.store, self.model) if manifest is None else not manifest.complete

    def _train(self) -> list[Checkpoint]:
        """Train all stages that are not done yet, in their order. Returns the final checkpoint of each stage."""
        name, conversations = self.model, f"{self.model}-chat"
        trained, dataset = trained_on(self.store, name), dataset_digest(self.store, name)
        if trained is not None and trained != dataset and not self.settings.start_over:
            raise UserError(
                f"tokenizers/{name} in {self.store} was trained on other data than data/{name} contains now; give "
                "--start-over to train it and the model again, or use another --model name"
            )
        if trained != dataset:
            flags: Flags = {"dataset": name, "name": name, **self.recipe.tokenizer}
            self._stage(
                "tokenizer",
                "jobs.train.tokenizer",
                flags,
                place="data",
                inputs={"dataset": dataset},
                done=lambda: trained_on(self.store, name) == dataset,
            )
        fitted = self.recipe.fitted(TextDataset(self.store, name, "train").bytes_up_to(_LONG_TEXT))
        self._story.expect(fitted.training_tokens)
        flags = {"dataset": name, "tokenizer": name, **fitted.pretrain}
        inputs = pretrain.input_digests(self.store, name, load_tokenizer(self.store, name))
        base = self._checkpoint("base", pretrain.__name__, flags, "nodes", inputs)
        flags = {"mixture": conversations, **self.recipe.sft}
        inputs = sft.input_digests(base, Mixture(self.store, conversations))
        tuned = self._checkpoint("sft", sft.__name__, flags, "node", inputs)
        if not self.settings.rl:
            return [base, tuned]
        inputs = rl.input_digests(tuned, self._problems())
        return [base, tuned, self._checkpoint("rl", rl.__name__, self.recipe.rl or {}, "node", inputs)]

    def _problems(self) -> Problems:
        return open_problems(self.store, str((self.recipe.rl or {})["task"]), held_out=1)

    def _checkpoint(self, stage: str, module: str, flags: Flags, place: Place, inputs: Mapping[str, str]) -> Checkpoint:
        """Train a stage unless the store has its final checkpoint, made from ``inputs``. Returns this checkpoint."""
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
            shown = {"ask": self.recipe.questions, "page-examples": self.recipe.examples}

            def made() -> Checkpoint | None:
                found = newest_checkpoint(self.store, self.model, stage)
                return found if found is not None and found.meta.get("inputs") == inputs else None

            self._stage(
                stage,
                module,
                {
                    "model": self.model,
                    **self._threads,
                    **{name: ",".join(texts) for name, texts in shown.items() if texts},
                    **flags,
                },
                place=place,
                inputs=inputs,
                start_over=stale,
                progress=lambda: found.ref.revision if (found := made()) else "",
                done=lambda: bool((found := made()) and found.meta["finished"]),
            )
            newest = newest_checkpoint(self.store, self.model, stage)
        if newest is None or not newest.meta["finished"]:
            raise UserError(f"{module} left no finished checkpoint of {self.model}")
        return newest

    def _stage(
        self,
        title: str,
        module: str,
        flags: Flags,
        *,
        place: Place,
        subcommand: str = "",
        inputs: Mapping[str, str] | None = None,
        start_over: bool = False,
        progress: Callable[[], str] = lambda: "",
        done: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run one stage to its end.

        ``title`` is a key of :data:`jobs.train.story.TITLES`. :class:`StageRun` explains the other arguments.
        """
        name = subcommand or module.rpartition(".")[2]
        flags = {"home": self.settings.home, **flags}
        stage = StageRun(name, module, flags, place, subcommand, inputs or {}, start_over, progress, done)
        with self._story.stage(title, module):
            if code := self._runner.run(stage):
                raise SystemExit(code)


def _runner(settings: PipelineSettings) -> Runner:
    """Returns the runner of the stages: processes of this machine, or PyTorchJobs of a cluster.

    Raises UserError if PyTorchJobs are wanted, and ``--job`` is malformed or this process does not run in a pod of the
    cluster.
    """
    if settings.on == "local":
        return Processes(settings.ranks)
    # Only PyTorchJobs need the package kubernetes, so it is imported here and not at the top of the file.
    from jobs.train.cluster.stage_jobs import StageJobs, in_this_cluster

    return StageJobs(
        *in_this_cluster(settings.job), nodes=settings.nodes, retries=settings.retries, processes=settings.ranks
    )


if __name__ == "__main__":
    run_program("jobs.train.pipeline", "pipeline", PipelineSettings, lambda s: Pipeline(s, RECIPES[s.recipe]).run())
