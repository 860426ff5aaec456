"""Builds the model, the optimizer and the trainer of a stage, in the same way for pretraining, fine-tuning and RL."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any, Literal, TypeVar

import torch

from jobs.measures.machine import describe_machine
from jobs.program import command_line, run_program
from jobs.train.batches.loader import Batch, PackedLoader
from jobs.train.loop.kernels import make_trainable, training_dtype
from jobs.train.loop.questions import answer_questions
from jobs.train.loop.run import Evaluation, Metrics, RunConfig, RunState
from jobs.train.loop.runtime import RunSettings, Runtime, open_runtime
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.step import Objective
from jobs.train.loop.trainer import Trainer
from nanochat_core.checkpoint import Checkpoint, CheckpointRef
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.settings import setting
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.optim import MuonAdamW, muon_dtype
from nanochat_core.training.peak_flops import peak_flops

log = logging.getLogger("jobs.train")

# Further settings that, like RunSettings, may change when a run is resumed.
_EVALUATION_SETTINGS = frozenset(
    {
        "eval_tokens",
        "core_every",
        "core_bundle",
        "core_max_per_task",
        "sample_every",
        "ask",
        "ask_every",
        "page_examples",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSettings(RunSettings):
    """Settings that every training stage has."""

    model: str = setting(help="name of the model in the store")
    seed: int = setting(1, "seed of everything random in the run", minimum=0, maximum=2**63 - 1)
    dtype: Literal["auto", "fastest", "fp32", "bf16", "fp16", "fp8"] = setting(
        "auto",
        "dtype of activations and matrix products; with auto, a run that starts from a checkpoint uses that of the "
        "checkpoint's run; fastest measures on a CPU whether bf16 or fp32 is faster",
    )
    ask: tuple[str, ...] = setting(
        (), "questions that the model answers during training, for the chat page; comma separated"
    )
    ask_every: int = setting(
        100,
        "steps between two rounds of answers to --ask; further rounds come before the first and after the last step",
        minimum=1,
    )
    page_examples: tuple[str, ...] = setting(
        (), "example messages that the chat page offers, stored with the model; comma separated"
    )


SettingsT = TypeVar("SettingsT", bound=StageSettings)


def run_stage(name: str, settings_class: type[SettingsT], train: Callable[[SettingsT, Runtime], CheckpointRef]) -> None:
    """Run the training program ``jobs.train.<name>``, with settings from its flags and environment variables.

    ``train`` returns the final checkpoint. The last log event names this checkpoint and the commands that may follow.
    """

    def main(settings: SettingsT) -> None:
        with open_runtime(name, settings, settings.model) as runtime:
            ref = train(settings, runtime)
            following = next_commands(ref, settings.home)
            log.info("training done", extra={"checkpoint": f"{runtime.store}/{ref.prefix}", "next": following})

    run_program(f"jobs.train.{name}", name, settings_class, main)


def next_commands(ref: CheckpointRef, home: str) -> list[str]:
    """The commands that usually follow after the end of a stage whose final checkpoint is ``ref``."""
    flags = {"model": ref.model, "home": home}
    if ref.stage == "base":
        return [
            command_line("jobs.eval.generate", "Once upon a time", **flags, stage="base"),
            command_line("jobs.train.sft", **flags, mixture="CONVERSATIONS.jsonl"),
        ]
    return [command_line("jobs.eval.generate", "Hello!", **flags), command_line("jobs.eval.report", **flags)]


class Stage:
    """One training stage in this process. It builds the model to train, and then the trainer.

    Attributes:
        precision: value of ``--dtype`` that the stage follows; with ``auto``, the value that its base was trained with,
            if there is a base.
        model: the model to train, on the runtime's device and with the chosen kernels.
        packed_loader: makes a :class:`PackedLoader` for the stage's tokenizer and device.
    """

    def __init__(
        self,
        name: str,
        settings: StageSettings,
        runtime: Runtime,
        config: ModelConfig,
        tokenizer: Tokenizer,
        base: Checkpoint | None = None,
    ) -> None:
        """
        Args:
            name: name of the stage in the store: ``base``, ``sft``, ``rl`` or ``lesson``.
            base: the checkpoint whose weights training starts from; None starts from random weights.
        """
        self._name, self._settings, self._runtime = name, settings, runtime
        self._tokenizer, self._base = tokenizer, base
        self.precision: str = settings.dtype
        if base is not None and self.precision == "auto":
            self.precision = base.meta.get("precision", "auto")
        dtype = training_dtype(self.precision, config, settings, runtime.device, runtime.ranks)
        torch.manual_seed(settings.seed)
        if base is not None:
            self.model = base.build_model(runtime.device, dtype)
        else:
            _check_size(config)
            self.model = GPT(config, dtype)
            self.model.init_weights()
            self.model.to(runtime.device)
        make_trainable(self.model, settings, runtime.device, self.precision)
        self.packed_loader = functools.partial(
            PackedLoader,
            pad_id=tokenizer.bos_id,
            workers=settings.loader_workers,
            pin_memory=runtime.device.type == "cuda",
        )

    def trainer(
        self,
        groups: list[dict[str, Any]],
        schedule: Schedule,
        open_batches: Callable[[dict[str, Any] | None], Generator[Batch]],
        evaluations: Sequence[Evaluation],
        *,
        inputs: dict[str, str],
        plan: dict[str, Any],
        objective: Objective | None = None,
        kept_step: int = 0,
    ) -> Trainer:
        """Build the trainer of this stage. It has not resumed from a checkpoint yet.

        Args:
            groups: parameter groups of the optimizer.
            open_batches, evaluations, objective: see :class:`Trainer`.
            inputs: digests of the data and weights that the stage is made from.
            plan: size of the run, stored with each checkpoint.
            kept_step: last step before the warmdown. The checkpoint of this step is kept, so that the run can go on to
                another horizon; 0 keeps none.
        """
        device, ranks, model = self._runtime.device, self._runtime.ranks, self.model
        # The checkpoint that the stage starts from. If it belongs to another model than the stage trains, the other
        # model's name is added.
        lineage = {"base": self._base.ref.revision} if self._base else {}
        if self._base and self._base.ref.model != self._settings.model:
            lineage["base_model"] = self._base.ref.model
        meta = {
            "settings": comparable(self._settings),
            "inputs": inputs,
            "examples": list(self._settings.page_examples),
            "plan": plan,
            **({"constant_until": kept_step} if kept_step else {}),
            **lineage,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "scaling_parameters": model.config.scaling_parameters,
            "flops_per_token": model.config.flops_per_token,
            "learning_rates": {group["name"]: group["lr"] for group in groups},
            "precision": self.precision,
            "dtype": str(model.compute_dtype).removeprefix("torch."),
            "device": device.type,
            "hardware": describe_machine() | {"ranks": ranks.size, "peak_flops": peak_flops(device)},
        }
        trainer = Trainer(
            RunConfig(self._settings.model, self._name, schedule, self._settings, meta, kept_step),
            self._runtime,
            model,
            self._tokenizer,
            MuonAdamW(groups, ranks, muon_dtype(device)),
            open_batches=open_batches,
            evaluations=[*evaluations, *self._questions(lambda: trainer.state)],
            objective=objective,
        )
        return trainer

    def _questions(self, state: Callable[[], RunState]) -> list[Evaluation]:
        """Evaluations that let the model answer the questions of ``ask``; empty if there are no questions.

        The answers are added to the run's history. They are not metrics, so the evaluation returns no metrics.
        """
        settings = self._settings

        def ask() -> Metrics:
            if self._runtime.ranks.leads:
                state().point()["answers"] = answer_questions(
                    self.model, self._tokenizer, settings.ask, chat=self._name != "base"
                )
            return {}

        return [Evaluation(ask, settings.ask_every, first=True)] if settings.ask else []


def _check_size(config: ModelConfig) -> None:
    """Raises UserError if a new model's weights do not fit into this machine's memory, where they are initialized."""
    parameters = config.block_matrix_parameters + 2 * config.dim * config.padded_vocab_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * parameters > memory:
        raise UserError(
            f"a model of depth {config.depth} and width {config.dim} has more than {parameters / 1e9:,.1f} billion "
            f"parameters, which do not fit into this machine's {memory / 2**30:,.0f} GiB of memory; lower --depth"
        )


def rows_per_batch(batch_tokens: int, context_length: int) -> int:
    """Number of rows in the global batch. Raises UserError if ``context_length`` does not divide ``batch_tokens``."""
    rows, rest = divmod(batch_tokens, context_length)
    if rest:
        raise UserError(
            f"a batch of {batch_tokens} tokens is not a whole number of rows of {context_length}; "
            "choose --batch-tokens as a multiple of the context length"
        )
    return rows


def comparable(settings: StageSettings) -> dict[str, Any]:
    """The settings that must be equal for a run to be resumed."""
    ignored = {field.name for field in dataclasses.fields(RunSettings)} | _EVALUATION_SETTINGS | {"model"}
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in ignored}
