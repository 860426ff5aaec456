"""What a chat model can do, task by task: ``python -m jobs.eval.chat --model demo``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from jobs.data.dataset_files import DatasetSource
from jobs.demo_world import EvalItem
from jobs.eval.chat_eval.examination import Sampling, examine_answers, examine_choices, generate, verdicts_of
from jobs.eval.chat_eval.scores import chat_core, score, table
from jobs.eval.checkpoints import pick_checkpoint
from jobs.generation.python_tool import SandboxTool
from jobs.recipes import find_recipe
from jobs.results.evaluations import Evaluation
from jobs.tasks import demo
from jobs.tasks.registry import Selection, open_tasks
from jobs.tasks.task import ChoiceTask, GenerativeTask, Response
from nanochat_core import logs
from nanochat_core.checkpoint import Checkpoint
from nanochat_core.cpu_setup import prepare_cpu
from nanochat_core.device import choose_device
from nanochat_core.engine import Engine, EngineConfig
from nanochat_core.errors import UserError, run_main
from nanochat_core.memory import free_memory
from nanochat_core.precision import choose_dtype
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.settings import load, setting
from nanochat_core.store import DEFAULT_HOME, Store, open_store
from nanochat_core.training.distributed import ALONE, Ranks, joined, local_rank

log = logging.getLogger("jobs.eval.chat")

# A rank whose answers are long comes long after one whose answers are short.
_RANK_TIMEOUT_SECONDS = 3600.0
# Prompt tokens that a step may compute for each sequence that runs.
_BUDGET_PER_SEQUENCE = 8
# Part of the identity of results: raise it when a task, a prompt or a scorer changes.
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ChatEvalSettings:
    """Measure how many questions of each task a chat model answers correctly."""

    model: str = setting(help="name of the model in the store")
    tasks: tuple[str, ...] = setting(("demo",), "what to ask: names of tasks and .jsonl files, comma separated")
    data: str = setting("", "folder with the tasks' data, <dataset>/…; the store's data/<dataset>/ otherwise")
    home: str = setting(DEFAULT_HOME, "artifact store: a folder or s3://bucket/prefix", env="NANOCHAT_HOME")
    stage: Literal["base", "sft", "rl"] = setting("sft", "stage whose newest checkpoint is evaluated")
    revision: str = setting("", "<stage>/step_<n> to evaluate instead")
    items: int = setting(0, "questions of each task; 0 asks all of a dataset and 200 of a generated task", minimum=0)
    seed: int = setting(0, "which questions are drawn, and how answers are sampled", minimum=0)
    recipe: str = setting("demo", "recipe whose kinds of conversations the task demo asks")
    samples: int = setting(1, "answers to each question, for pass@1 to pass@samples", minimum=1)
    temperature: float = setting(0.0, "of sampling; 0 is greedy", minimum=0.0)
    top_k: int = setting(0, "sample from the k most likely tokens; 0 from all", minimum=0)
    batch: int = setting(64, "answers that are generated at the same time", minimum=1)
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "where to compute")
    dtype: Literal["auto", "fp32", "bf16"] = setting("auto", "what to compute in; auto is fp32 on CPUs")
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "least severe level that is logged")

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature == 0:
            raise UserError(f"{self.samples} greedy answers are all the same; give a --temperature above 0")
        if self.samples > self.batch:
            raise UserError(f"--samples {self.samples} are generated together, so --batch must be at least that")


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said to one item of the demo world, and whether it was right."""

    item: EvalItem
    text: str
    tool_calls: tuple[tuple[str, str], ...]  # code and output of each
    correct: bool


@dataclasses.dataclass(frozen=True)
class ChatResult:
    """All answers to items of the demo world."""

    revision: str
    answers: tuple[Answer, ...]

    def accuracy(self, kinds: Sequence[str] | None = None) -> float:
        """Share of right answers among the items of ``kinds`` (all when None)."""
        chosen = [answer.correct for answer in self.answers if kinds is None or answer.item.kind in kinds]
        return sum(chosen) / len(chosen)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Right answers and items of each kind."""
        asked = Counter(answer.item.kind for answer in self.answers)
        right = Counter(answer.item.kind for answer in self.answers if answer.correct)
        return {kind: (right[kind], asked[kind]) for kind in sorted(asked)}

    def summary(self) -> dict[str, Any]:
        """For ``report.json``."""
        return {
            "revision": self.revision,
            "accuracy": self.accuracy(),
            "kinds": {kind: {"right": right, "items": items} for kind, (right, items) in self.by_kind().items()},
        }


def evaluate(checkpoint: Checkpoint, items: Sequence[EvalItem]) -> ChatResult:
    """Answer items of the demo world greedily, on the CPU, all in one continuous batch; nothing is kept."""
    task = demo.task(items)
    responses: dict[int, Response] = {}
    with SandboxExecutor() as sandbox:
        engine = Engine(checkpoint.build_model(), checkpoint.tokenizer, tool_runner=SandboxTool(sandbox))
        try:
            for number, said in generate(engine, checkpoint.tokenizer, task, range(len(items))):
                # What does not fit is not answered, and that is wrong.
                responses[number] = said[0] if said else Response("")
        finally:
            engine.close()
        answers = [
            Answer(
                item, responses[number].text.strip(), responses[number].tool_calls,
                task.questions[number].correct(responses[number], sandbox),
            )
            for number, item in enumerate(items)
        ]  # fmt: skip
    return ChatResult(checkpoint.ref.revision, tuple(answers))


def run(
    settings: ChatEvalSettings,
    show: Callable[[str], None],
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any] | None:
    """Evaluate, keep the result in the store, and show a table and wrong answers.

    Finished work of an earlier, interrupted run is not done again; a whole result is shown as it is.

    Returns:
        The content of ``result.json``, on the first rank.

    Raises:
        UserError: a setting is wrong, or a task's data are missing or wrong.
    """
    device = device or torch.device("cpu")
    store = open_store(settings.home)
    source = DatasetSource(store, Path(settings.data).expanduser() if settings.data else None)
    kinds = find_recipe(settings.recipe).conversation_kinds
    tasks = open_tasks(settings.tasks, source, Selection(settings.items, settings.seed, kinds))
    checkpoint = pick_checkpoint(store, settings.model, settings.revision, settings.stage)
    evaluation = _evaluation(settings, store, checkpoint, tasks, device)
    result = evaluation.result()
    if result is None:
        _examine(settings, checkpoint, tasks, evaluation, device, ranks)
        ranks.gather(None)  # every rank has kept its part when all are here
        if not ranks.leads:
            return None
        result = evaluation.finish(_figures(tasks, evaluation, settings.samples))
    if ranks.leads:
        _show(result, [task.name for task in tasks], show)
    return result


def _evaluation(
    settings: ChatEvalSettings,
    store: Store,
    checkpoint: Checkpoint,
    tasks: Sequence[ChoiceTask | GenerativeTask],
    device: torch.device,
) -> Evaluation:
    decisive = {
        "version": _VERSION,
        "tasks": {task.name: task.digest for task in tasks},
        "seed": settings.seed,
        "samples": settings.samples,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "device": device.type,
        "dtype": str(choose_dtype(settings.dtype, device)).removeprefix("torch."),
    }
    return Evaluation.of(store, checkpoint, "chat", decisive)


def _examine(
    settings: ChatEvalSettings,
    checkpoint: Checkpoint,
    tasks: Sequence[ChoiceTask | GenerativeTask],
    evaluation: Evaluation,
    device: torch.device,
    ranks: Ranks,
) -> None:
    model, tokenizer = checkpoint.build_model(device, choose_dtype(settings.dtype, device)), checkpoint.tokenizer
    for task in tasks:
        if isinstance(task, ChoiceTask):
            examine_choices(model, tokenizer, task, evaluation, ranks)
    generative = [task for task in tasks if isinstance(task, GenerativeTask)]
    if not generative:
        return
    # The engine's cache takes what is free, so it comes after what needs memory for itself.
    free_memory(device)
    default = EngineConfig()
    config = EngineConfig(
        max_running=settings.batch, token_budget=max(default.token_budget, _BUDGET_PER_SEQUENCE * settings.batch)
    )
    sampling = Sampling(settings.samples, settings.temperature, settings.top_k, settings.seed)
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(SandboxExecutor())
        engine = Engine(model, tokenizer, config, tool_runner=SandboxTool(sandbox))
        stack.callback(engine.close)
        for task in generative:
            examine_answers(engine, tokenizer, sandbox, task, evaluation, sampling, ranks)


def _figures(tasks: Sequence[ChoiceTask | GenerativeTask], evaluation: Evaluation, samples: int) -> dict[str, Any]:
    figures = {task.name: score(task, verdicts_of(evaluation, task), samples) for task in tasks}
    return {"tasks": figures, "chat_core": chat_core(figures)}


def _show(result: Mapping[str, Any], names: Sequence[str], show: Callable[[str], None]) -> None:
    show(f"{result['model']} {result['revision']}")
    for line in table({name: result["tasks"][name] for name in names}, result["chat_core"]):
        show(line)
    for name in names:
        # A wrong letter tells nothing.
        if result["tasks"][name]["kind"] == "generative":
            for example in result["tasks"][name]["examples"]:
                if not example["right"]:
                    shown = {"wrong": name} | {key: example[key] for key in ("asked", "expected", "said", "calls")}
                    show(json.dumps(shown, ensure_ascii=False))


def main() -> None:
    settings = load(ChatEvalSettings, prefix="NANOCHAT_CHAT_EVAL", program="python -m jobs.eval.chat")
    prepare_cpu(settings.threads)
    device = choose_device(settings.device)
    if device.type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
    with joined(device, _RANK_TIMEOUT_SECONDS) as ranks:
        logs.configure("chat-eval", settings.log_level if ranks.leads else "warning")
        run(settings, lambda line: print(line, file=sys.stdout), device, ranks)


if __name__ == "__main__":
    run_main(main, "python -m jobs.eval.chat")
