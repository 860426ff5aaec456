"""Finds tasks by name: to evaluate, to fine-tune on, or to practice on with reinforcement learning."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence

from jobs.data.dataset_files import DatasetSource
from jobs.data.files import file_format, find_files
from jobs.data.splits import split_files
from jobs.demo_world.evaluation import evaluation_set
from jobs.tasks import arc, arithmetic, demo, gsm8k, humaneval, mmlu, smoltalk
from jobs.tasks.conversations import Conversations, FileConversations, GeneratedConversations, own_conversations
from jobs.tasks.letters import COUNTING, SPELLING
from jobs.tasks.own_questions import own_task
from jobs.tasks.task import ChoiceTask, GenerativeTask, Problems
from nanochat_core.errors import UserError
from nanochat_core.paths import user_path
from nanochat_core.store import Store

log = logging.getLogger("jobs.tasks.registry")

AnyTask = ChoiceTask | GenerativeTask

# A generator never runs out of questions, so a task that generates questions asks this many by default.
GENERATED_QUESTIONS = 200

_FROM_FILES: Mapping[str, Callable[[DatasetSource], AnyTask]] = {
    "mmlu": mmlu.task,
    "arc-easy": functools.partial(arc.task, subset="Easy"),
    "arc-challenge": functools.partial(arc.task, subset="Challenge"),
    "gsm8k": gsm8k.task,
    "humaneval": humaneval.task,
}
_GENERATED = {task.name: task for task in (SPELLING, COUNTING)}
TASKS = ("demo", *_FROM_FILES, *_GENERATED)

CONVERSATION_FILES = {
    "smoltalk": smoltalk.CONVERSATIONS,
    "mmlu": mmlu.CONVERSATIONS,
    "arc": arc.CONVERSATIONS,
    "gsm8k": gsm8k.CONVERSATIONS,
    "identity": own_conversations("identity"),
}
CONVERSATION_GENERATORS = {name: GeneratedConversations(task.conversation, 20_000) for name, task in _GENERATED.items()}

PROBLEMS: Mapping[str, Callable[[Store, int], Problems]] = {
    "arithmetic": arithmetic.problems,
    "gsm8k": gsm8k.problems,
}


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rules by which an evaluation selects the questions that it asks of each task.

    Attributes:
        items: largest number of questions of each task; 0 asks all questions of a dataset, and at most 200 questions of
            a generated task.
        seed: decides which questions are chosen or generated.
        kinds: kinds of conversations that the task ``demo`` asks; None asks every kind.
    """

    items: int = 0
    seed: int = 0
    kinds: frozenset[str] | None = None


def open_tasks(names: Sequence[str], source: DatasetSource, selection: Selection) -> list[AnyTask]:
    """The evaluation tasks with the given names; a name that ends in ``.jsonl`` is a file of the user's own questions.

    Raises:
        UserError: there is no name, a name is unknown, two tasks have the same name, or a task's files are missing or
            wrong.
    """
    tasks = [_open(name, source, selection) for name in names]
    if not tasks:
        raise UserError(f"there is no task to evaluate; choose from {', '.join(TASKS)}, or a .jsonl file")
    for task in tasks:
        if sum(other.name == task.name for other in tasks) > 1:
            raise UserError(f"two of the tasks are called {task.name}; each is evaluated once")
    return tasks


def _open(name: str, source: DatasetSource, selection: Selection) -> AnyTask:
    generated = selection.items or GENERATED_QUESTIONS
    if name == "demo":
        return demo.task(evaluation_set(generated, selection.seed, selection.kinds))
    if name in _GENERATED:
        return _GENERATED[name].task(generated, selection.seed)
    if name.endswith(".jsonl"):
        task = own_task(user_path(name))
        if task.name in TASKS:
            raise UserError(f"the file {name} has the name of a task; call it something else")
    elif name in _FROM_FILES:
        task = _FROM_FILES[name](source)
    else:
        raise UserError(f"there is no task {name!r}; choose from {', '.join(TASKS)}, or a .jsonl file")
    return task.sample(selection.items, selection.seed) if selection.items else task


def open_conversations(store: Store, name: str) -> tuple[Conversations, Conversations | None]:
    """Open the conversations that a mixture calls ``name``.

    They come from a built-in dataset or generator, a file or folder of this machine, or a folder of the store. A name
    is a path of this machine if it begins with ``/``, ``./``, ``../`` or ``~``, or has the ending of a data file, such
    as ``.jsonl``.

    Returns the training conversations, and the validation conversations if the store has ``data/<name>/val.jsonl`` or
    the names of the files of a local folder state a validation or test split.

    Raises:
        UserError: nothing has this name, or a file is wrong; the message says where the files should be and how to get
            them.
    """
    if name in CONVERSATION_GENERATORS:
        return CONVERSATION_GENERATORS[name], None
    if name.startswith(("/", "./", "../", "~")) or file_format(name):
        return _local_conversations(name)
    known = ", ".join((*CONVERSATION_FILES, *CONVERSATION_GENERATORS))
    dataset = CONVERSATION_FILES.get(name) or own_conversations(name, f"; {name!r} is none of {known}")
    training = FileConversations(DatasetSource(store).find(dataset.files), dataset)
    validation = f"data/{name}/val.jsonl"
    if not store.exists(validation):
        return training, None
    return training, FileConversations({validation: store.fetch(validation)}, dataset)


def _local_conversations(name: str) -> tuple[Conversations, Conversations | None]:
    """Conversations in a file of this machine, or in a folder such as a dataset of the Hugging Face hub."""
    path, dataset = user_path(name), own_conversations(name)
    if not path.exists():
        raise UserError(f"the file {name} does not exist")
    found = {file: path for file, path in find_files(path).items() if file_format(file) != "text"}
    if not found:
        raise UserError(f"{name} holds text; conversations are rows of a parquet, JSON or CSV file")
    if path.is_file():
        return FileConversations({name: path}, dataset), None
    splits = split_files(found, name, "name the files of conversations one by one")
    log.info("files of the conversations", extra=dataclasses.asdict(splits))

    def opened(files: Sequence[str]) -> FileConversations:
        return FileConversations({f"{name}/{file}": found[file] for file in files}, dataset)

    return opened(splits.training), opened(splits.validation) if splits.validation else None


def open_problems(store: Store, name: str, held_out: int) -> Problems:
    """The problems of the task ``name`` for reinforcement learning. At most ``held_out`` problems are for evaluation.

    Raises:
        UserError: the name is unknown, a file of the task is wrong, or the store lacks the task's files. In the last
            case, the message says how to get them.
    """
    if name not in PROBLEMS:
        raise UserError(f"there is no task {name!r} to practice; choose one of {', '.join(PROBLEMS)}")
    return PROBLEMS[name](store, held_out)
