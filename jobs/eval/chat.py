"""Evaluate a chat model on tasks: ``python -m jobs.eval.chat --model demo``."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from jobs.data.dataset_files import DatasetSource
from jobs.eval.chat_eval.evaluate_tasks import evaluate_choices, evaluate_generative, graded_answers_of
from jobs.eval.chat_eval.scores import chat_core, score, table
from jobs.generation import SandboxTool
from jobs.program import JobSettings, run_program
from jobs.recipes import find_recipe
from jobs.results.evaluations import Evaluation, Result
from jobs.results.metrics import CHAT_TASKS
from jobs.tasks.registry import AnyTask, Selection, open_tasks
from jobs.tasks.task import ChoiceTask, GenerativeTask
from nanochat_core.checkpoint import Checkpoint, pick_checkpoint
from nanochat_core.device import choose_dtype, free_memory, prepare_cpu
from nanochat_core.engine import Engine, EngineConfig, SamplingParams
from nanochat_core.errors import UserError
from nanochat_core.paths import user_path
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.settings import setting
from nanochat_core.store import Store, open_store
from nanochat_core.training.distributed import ALONE, Ranks, joined, rank_device
from nanochat_core.training.leases import leased

# Ranks wait this long for each other, because a rank with long answers can finish much later than a rank with short
# answers.
_RANK_TIMEOUT_SECONDS = 3600.0
# A step of the engine computes at most this many tokens for each sequence that can run at the same time. If the default
# of the engine is larger, the default applies.
_BUDGET_PER_SEQUENCE = 8
# Raise this number when a task, a prompt or a scorer changes, so that earlier results do not count any more.
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatEvalSettings(JobSettings):
    """Measure how many questions of each task a chat model answers correctly."""

    model: str = setting(help="name of the model in the store")
    tasks: tuple[str, ...] = setting(("demo",), "names of tasks and .jsonl files with questions, comma separated")
    data: str = setting(
        "", "folder with the tasks' data in <dataset>/; data that it lacks is read from data/<dataset>/ of the store"
    )
    stage: Literal["base", "sft", "rl"] = setting("sft", "stage whose newest checkpoint is evaluated")
    revision: str = setting("", "<stage>/step_<n>, or promoted, instead of the newest checkpoint of a stage")
    items: int = setting(
        0,
        "largest number of questions per task; 0 is all questions of a dataset and at most 200 of a generated task",
        minimum=0,
    )
    seed: int = setting(0, "seed of the choice of questions and of the sampling", minimum=0)
    recipe: str = setting("demo", "recipe whose kinds of conversations the task demo asks")
    samples: int = setting(1, "answers to each question, for pass@1 to pass@samples", minimum=1)
    temperature: float = setting(0.0, "sampling temperature; 0 is greedy", minimum=0.0)
    top_k: int = setting(0, "number of most likely tokens to sample from; 0 samples from all tokens", minimum=0)
    batch: int = setting(64, "largest number of answers that are generated at the same time", minimum=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device to compute on")
    dtype: Literal["auto", "fp32", "bf16"] = setting("auto", "dtype to compute in; auto is fp32 on CPUs")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0, maximum=4096)

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"{self.samples} greedy answers are all the same; give a --temperature above 0")
        if self.samples > self.batch:
            raise UserError(f"--samples {self.samples} are generated together, so --batch must be at least that")


def run(
    settings: ChatEvalSettings, show: Callable[[str], None], device: torch.device | None = None, ranks: Ranks = ALONE
) -> dict[str, Any] | None:
    """Evaluate, store the result, and show a table and some wrong answers.

    Chunks of questions that an interrupted run has finished are not evaluated again. If an earlier run has stored the
    result, nothing is evaluated. The first rank returns the content of ``result.json``. The other ranks return None if
    they had to evaluate.
    """
    device = device or torch.device("cpu")
    store = open_store(settings.home)
    source = DatasetSource(store, user_path(settings.data) if settings.data else None)
    kinds = find_recipe(settings.recipe).conversation_kinds
    tasks = open_tasks(settings.tasks, source, Selection(settings.items, settings.seed, kinds))
    checkpoint = pick_checkpoint(store, settings.model, settings.revision, settings.stage)
    evaluation = evaluation_of(settings, store, checkpoint, tasks, device)
    # All ranks decide by what the first rank finds in the store, because another program could store or delete the
    # result after one rank has looked for it and before another rank looks.
    result: Result | None = ranks.gather(evaluation.result())[0]
    if result is None:
        with leased(store, evaluation.folder, "jobs.eval.chat", ranks):
            _evaluate(settings, checkpoint, tasks, evaluation, device, ranks)
            ranks.gather(None)  # waits until every rank has stored its chunks
            if not ranks.leads:
                return None
            figures = {task.name: score(task, graded_answers_of(evaluation, task), settings.samples) for task in tasks}
            chatcore, missing = chat_core(figures)
            result = evaluation.finish({"chatcore": chatcore, "missing": missing, "tasks": figures})
    if ranks.leads:
        _show(result, [task.name for task in tasks], show)
    return result


def evaluation_of(
    settings: ChatEvalSettings, store: Store, checkpoint: Checkpoint, tasks: Sequence[AnyTask], device: torch.device
) -> Evaluation:
    """The evaluation of a checkpoint on ``tasks``.

    The names of the tasks and the sampling determine the evaluation's folder below the checkpoint's folder. So results
    on tasks of different names are in separate folders, and so are results of greedy and of sampled answers.
    """
    sampling = {"samples": settings.samples, "temperature": settings.temperature, "top_k": settings.top_k}
    decisive = {
        "version": _VERSION,
        "tasks": {task.name: task.digest for task in tasks},
        "seed": settings.seed,
        **sampling,
        "device": device.type,
        "dtype": str(choose_dtype(settings.dtype, device)).removeprefix("torch."),
    }
    named = json.dumps([sorted(task.name for task in tasks), sampling], sort_keys=True)
    key = hashlib.sha256(named.encode()).hexdigest()[:12]
    return Evaluation.of(store, checkpoint, CHAT_TASKS, decisive, key)


def _evaluate(
    settings: ChatEvalSettings,
    checkpoint: Checkpoint,
    tasks: Sequence[AnyTask],
    evaluation: Evaluation,
    device: torch.device,
    ranks: Ranks,
) -> None:
    model, tokenizer = checkpoint.build_model(device, choose_dtype(settings.dtype, device)), checkpoint.tokenizer
    for task in tasks:
        if isinstance(task, ChoiceTask):
            evaluate_choices(model, tokenizer, task, evaluation, ranks)
    generative = [task for task in tasks if isinstance(task, GenerativeTask)]
    if not generative:
        return
    # The engine starts after the multiple-choice tasks, because the size of its KV cache on a GPU follows from the
    # memory that is free when the engine starts.
    free_memory(device)
    config = EngineConfig(
        max_running=settings.batch,
        token_budget=max(EngineConfig.token_budget, _BUDGET_PER_SEQUENCE * settings.batch),
    )
    sampling = SamplingParams(temperature=settings.temperature, top_k=settings.top_k, seed=settings.seed)
    with (
        SandboxExecutor() as sandbox,
        contextlib.closing(Engine(model, tokenizer, config, tool_runner=SandboxTool(sandbox))) as engine,
    ):
        for task in generative:
            evaluate_generative(engine, tokenizer, sandbox, task, evaluation, sampling, settings.samples, ranks)


def _show(result: Mapping[str, Any], names: Sequence[str], show: Callable[[str], None]) -> None:
    show(f"{result['model']} {result['revision']}")
    tasks = {name: result["tasks"][name] for name in names}
    for line in table({**result, "tasks": tasks}):
        show(line)
    for name, task in tasks.items():
        # A wrong letter of a multiple-choice question is not shown, because it explains nothing.
        for example in task["examples"] if task["kind"] == "generative" else ():
            if not example["right"]:
                shown = ("before", "question", "expected", "answer", "calls")
                quoted = {key: example[key] for key in shown if example.get(key) or key != "before"}
                show(json.dumps({"wrong": name, **quoted}, ensure_ascii=False))


def main(settings: ChatEvalSettings) -> None:
    prepare_cpu(settings.threads)
    device = rank_device(settings.device)
    with joined(device, _RANK_TIMEOUT_SECONDS) as ranks:
        run(settings, print, device, ranks)


if __name__ == "__main__":
    run_program("jobs.eval.chat", "chat-eval", ChatEvalSettings, main)
