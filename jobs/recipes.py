"""Recipes: the data to train on, and the settings of each stage from tokenizer to promotion."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from jobs.data.local_text import LocalText, cut_position
from jobs.data.shards import dataset_exists, shard_keys, write_dataset
from jobs.demo_world.conversations import CONVERSATION_MIX, conversations
from jobs.demo_world.documents import pretraining_documents
from jobs.demo_world.evaluation import EvalItem, evaluation_set
from jobs.promotion.rules import Gate
from jobs.tasks.conversations import write_conversations
from nanochat_core.errors import UserError
from nanochat_core.store import Store

log = logging.getLogger("jobs.recipes")

Flags = Mapping[str, str | int | float]


def flag_arguments(flags: Flags) -> list[str]:
    """Flags as command-line arguments of a program. False becomes ``--no-<name>``, and True becomes ``--<name>``."""
    return [
        f"--{'' if value else 'no-'}{name}" if isinstance(value, bool) else f"--{name}={value}"
        for name, value in flags.items()
    ]


# Largest number of passes over a short text (see Recipe.fitted), because in further passes a model learns little that
# helps with other text.
MOST_PASSES = 40
FEWEST_STEPS, SMALLEST_BATCH = 60, 1024
# Typical number of bytes in a token. It serves to estimate the number of tokens in a text.
BYTES_PER_TOKEN = 3

# Kinds of demo conversations for recipes whose text is not the demo world's. Their questions are about the assistant,
# about calculations and letters, or are small talk, so a model can answer them without the facts of the demo world.
WORLDLESS_KINDS = frozenset({"greeting", "identity", "arithmetic", "counting", "smalltalk"})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The data and the settings from which one kind of chat model is trained.

    Attributes:
        summary: a few words about the recipe, for the help of the pipeline's ``--recipe``.
        tokenizer, pretrain, sft: flags of each stage's program.
        conversation_kinds: kinds of demo conversations for fine-tuning and evaluation; None means all kinds.
        train_conversations: number of conversations to fine-tune on.
        rl: flags of reinforcement learning, for the pipeline's ``--rl``; None if the recipe has no task for
            reinforcement learning.
        needs_data: whether the user must give the text; otherwise the demo world generates it.
        web_shards: numbers of the shards of the public web text, such as ``0-169``, that are downloaded if neither
            ``--data`` nor the store has text.
        document_characters: maximum length of a training document, in characters; None sets no limit. Longer documents
            are cut at sentence ends into pieces of about a row, so that most rows begin at the beginning of a sentence.
        gate: rules that a model must pass to be promoted.
        questions: questions that the model answers at several steps of its training, for people who watch. A question
            has no comma, because commas separate the questions in a flag.
        examples: messages that the chat page offers. A message has no comma, because commas separate them in a flag.
    """

    name: str
    summary: str
    tokenizer: Flags
    pretrain: Flags
    sft: Flags
    conversation_kinds: frozenset[str] | None
    train_conversations: int
    rl: Flags | None = None
    needs_data: bool = False
    web_shards: str = ""
    document_characters: int | None = None
    gate: Gate = dataclasses.field(default_factory=Gate)
    questions: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    def fitted(self, text_bytes: int) -> Self:
        """The recipe for a training text of ``text_bytes`` bytes: a short text gets fewer steps or smaller batches.

        A recipe that makes its own data, or does not set both steps and batch size, stays unchanged.

        A model that sees a text very often repeats it and predicts other text worse. So the steps show the text at most
        about :data:`MOST_PASSES` times. First the number of steps is lowered, but not below :data:`FEWEST_STEPS`. If
        the steps still show the text too often, the batches become smaller, down to about :data:`SMALLEST_BATCH`
        tokens. The learning rates then follow the square root of the batch size. A warning reports the new numbers of
        steps and of tokens in a batch.
        """
        steps, batch = self.pretrain.get("steps"), self.pretrain.get("batch-tokens")
        if not (self.needs_data and isinstance(steps, int) and isinstance(batch, int)):
            return self
        tokens = text_bytes / BYTES_PER_TOKEN * MOST_PASSES
        if tokens >= steps * batch:
            return self
        smaller = batch
        while smaller // 2 >= SMALLEST_BATCH and tokens < smaller * FEWEST_STEPS:
            smaller //= 2
        fewer = min(steps, max(FEWEST_STEPS, int(tokens / smaller)))
        log.warning(
            "the text is short for this model, which is trained for fewer steps",
            extra={"text_bytes": text_bytes, "steps": fewer, "batch_tokens": smaller, "usual_steps": steps},
        )
        rows = smaller // int(self.pretrain["context-length"])
        fitted = {
            "steps": fewer,
            "batch-tokens": smaller,
            "device-batch-rows": min(int(self.pretrain["device-batch-rows"]), rows),
            "lr-scale": float(self.pretrain["lr-scale"]) * (smaller / batch) ** 0.5,
            "warmup-steps": min(int(self.pretrain["warmup-steps"]), fewer // 5),
            "eval-every": min(int(self.pretrain["eval-every"]), max(1, fewer // 4)),
        }
        return dataclasses.replace(self, pretrain={**self.pretrain, **fitted})

    @property
    def training_tokens(self) -> dict[str, int]:
        """Number of tokens on which the stages ``base`` and ``sft`` train, if the recipe sets steps and batch size."""
        planned = {}
        for stage, flags in (("base", self.pretrain), ("sft", self.sft)):
            steps, batch = flags.get("steps"), flags.get("batch-tokens")
            if isinstance(steps, int) and isinstance(batch, int):
                planned[stage] = steps * batch
        return planned

    def evaluation_items(self, count: int, seed: int = 0) -> list[EvalItem]:
        """Draw ``count`` held-out questions of the demo world, and return those whose kind the recipe teaches."""
        return evaluation_set(count, seed, self.conversation_kinds)

    def prepare(self, store: Store, name: str, data: LocalText | None) -> None:
        """Write text to ``data/<name>`` and conversations to ``data/<name>-chat`` unless the store has them.

        Raises UserError if the recipe makes its own data and ``data`` is given, or if the recipe needs text and neither
        ``data`` nor the store has it. Also raises the errors of :meth:`LocalText.documents` and :func:`write_dataset`.
        """
        if data is not None and not self.needs_data:
            raise UserError(f"recipe {self.name} makes its own data; leave --data out or use --recipe small")
        if not (dataset_exists(store, name) or (self.needs_data and data is None and shard_keys(store, name))):
            self._write_text(store, name, data)
        if not store.exists(f"data/{name}-chat/val.jsonl"):
            for split, count in (("train", self.train_conversations), ("val", 256)):
                write_conversations(store, f"{name}-chat", split, self._conversations(split, count))

    def _write_text(self, store: Store, name: str, data: LocalText | None) -> None:
        training: Iterable[str]
        validation: Iterable[str]
        if self.needs_data:
            if data is None:
                raise UserError(
                    f"recipe {self.name} needs text: give --data FILE_OR_FOLDER, or put parquet shards with a text "
                    f"column into {store}/data/{name}, the last of which is for validation"
                )
            training, validation = data.documents()
            source = str(data.data)
        else:
            training = pretraining_documents(seed=1, n=DEMO_DOCUMENTS)
            validation = pretraining_documents(seed=2, n=DEMO_VALIDATION_DOCUMENTS)
            source = "the demo world"
        if self.document_characters:
            training = cut_documents(training, self.document_characters)
        write_dataset(store, name, training, validation, source=source)

    def _conversations(self, split: str, count: int) -> Iterator[dict[str, Any]]:
        # Validation uses the demo world's training split too, because the held-out split is reserved for evaluation.
        mix = {
            kind: share
            for kind, share in CONVERSATION_MIX.items()
            if self.conversation_kinds is None or kind in self.conversation_kinds
        }
        return conversations("train", seed=1 if split == "train" else 2, n=count, mix=mix)


def cut_documents(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Cut documents into pieces of at most ``characters``, at the ends of sentences if possible."""
    for document in documents:
        rest = document.strip()
        while len(rest) > characters:
            cut = cut_position(rest, characters)
            yield rest[:cut].strip()
            rest = rest[cut:].strip()
        if rest:
            yield rest


DEMO_DOCUMENTS = 24_000
DEMO_VALIDATION_DOCUMENTS = 500

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="demo",
            summary="a small invented world, learned in minutes on two CPU cores",
            tokenizer={"vocab-size": 2048},
            # These values were found by trial (docs/experiments.md). With so few training tokens, a model learns most
            # in many small steps, with much higher learning rates than the scaling rules give for this batch size. In
            # equal time, a model of depth 3 learns more than a model of depth 4. Pretraining does not compile the
            # model, because compiling takes longer than its compiled steps together would save.
            pretrain={
                "depth": 3,
                "dtype": "fastest",
                "head-dim": 64,
                "context-length": 1024,
                "row-tokens": 256,
                "batch-tokens": 2048,
                "device-batch-rows": 8,
                "steps": 320,
                "lr-scale": 0.6,
                "weight-decay": 0.1,
                "warmup-steps": 20,
                "momentum-warmup-steps": 130,
                "eval-every": 160,
                "eval-tokens": 20_000,
                "ask-every": 40,
                "compile": False,
            },
            # Checkpoints are frequent, because during fine-tuning the engine of ``make run`` serves the newest one.
            sft={
                "batch-tokens": 2048,
                "device-batch-rows": 2,
                "steps": 3200,
                "lr-scale": 0.35,
                "eval-every": 1000,
                "save-every": 160,
                "ask-every": 160,
            },
            conversation_kinds=None,
            train_conversations=80_000,
            # In good runs, about 95 % of all answers and 93 % of the answers about identity are right. A run with a
            # fault in any part stays far below these thresholds.
            gate=Gate(
                require=(
                    "chat.accuracy>=0.85",
                    "chat.kinds.identity>=0.8",
                    "chat.kinds.fact>=0.8",
                    "chat.kinds.arithmetic>=0.8",
                    "chat.kinds.expression>=0.8",
                )
            ),
            questions=("Who keeps the lighthouse?", "What is 1234 * 5678?", "How many letters r are in strawberry?"),
            examples=(
                "Hello! Who are you?",
                "Who keeps the lighthouse?",
                "What is 1234 * 5678?",
                "How many letters r are in strawberry?",
                "What is 26% of 1234?",
                "Which is larger: 9.11 or 9.9?",
            ),
            # There are only 40 steps, because the model would forget other skills in further steps (docs/rl.md). The
            # steps take about two and a half minutes.
            rl={
                "task": "arithmetic",
                "steps": 40,
                "examples": 8,
                "samples": 16,
                "max-new-tokens": 96,
                "lr-scale": 0.1,
                "held-out": 128,
            },
        ),
        Recipe(
            name="small",
            summary="your own text on two CPU cores, about ten minutes",
            tokenizer={"vocab-size": 4096},
            pretrain={
                "depth": 4,
                "head-dim": 64,
                "context-length": 256,
                "batch-tokens": 8192,
                # Pretraining has as many rows as fine-tuning, so fine-tuning finds its compiled code in the cache. All
                # layers have the same attention window ("L"), so fewer kinds of blocks must be compiled.
                "device-batch-rows": 16,
                "window-pattern": "L",
                "steps": 260,
                "lr-scale": 0.8,
                "weight-decay": 0.1,
                "warmup-steps": 20,
                "momentum-warmup-steps": 100,
                "eval-every": 100,
                "eval-tokens": 50_000,
                "ask-every": 40,
            },
            sft={
                "batch-tokens": 4096,
                "device-batch-rows": 16,
                "steps": 120,
                "lr-scale": 0.3,
                "eval-every": 50,
                "save-every": 40,
                "ask-every": 20,
            },
            conversation_kinds=WORLDLESS_KINDS,
            train_conversations=10_000,
            needs_data=True,
            document_characters=900,
            gate=Gate(require=("chat.accuracy>=0.25", "bpb.bits_per_byte<=3")),
            questions=("Hello! Who are you?", "What is 1234 * 5678?", "How many letters r are in strawberry?"),
            examples=("Hello! Who are you?", "What is 1234 * 5678?", "How many letters r are in strawberry?"),
        ),
        Recipe(
            name="speedrun",
            summary="a model of GPT-2's ability on a GPU node, from public web text",
            tokenizer={"vocab-size": 32768},
            pretrain={"depth": 24, "ratio": 8},
            sft={},
            conversation_kinds=WORLDLESS_KINDS,
            train_conversations=100_000,
            rl={"task": "gsm8k", "held-out": 400},
            needs_data=True,
            web_shards="0-169",
            gate=Gate(require=("chat.accuracy>=0.25", "bpb.bits_per_byte<=1")),
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name. Raises UserError if there is no such recipe."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
