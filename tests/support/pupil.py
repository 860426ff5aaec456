"""A model in a copied store that gets lessons from the program that people use, for programs that measure lessons."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.eval.chat_eval.evaluate_tasks import answer_greedily
from jobs.tasks.answers import contains_phrase
from jobs.tasks.task import GenerativeTask, OpenQuestion, Response, ask
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint, promoted
from nanochat_core.device import prepare_cpu
from nanochat_core.errors import EXIT_REFUSED
from nanochat_core.lessons.items import Item, to_lines
from nanochat_core.lessons.records import Lesson, lessons
from nanochat_core.sandbox import SandboxExecutor
from nanochat_core.store import Store, open_store

ROOT = Path(__file__).parents[2]
_MAX_TOKENS = 120


@dataclasses.dataclass(frozen=True)
class Pupil:
    """A promoted model that gets lessons. ``threads`` is the number of CPU threads of training and answers."""

    home: Path
    model: str
    threads: int

    @classmethod
    def copy(cls, source: str, folder: Path, model: str, threads: int) -> Pupil:
        """Copy the store ``source`` into ``folder``, so that lessons leave it as it is."""
        shutil.copytree(source, folder / "home")
        prepare_cpu(threads)
        return cls(folder / "home", model, threads)

    @classmethod
    def imported(cls, source: str, folder: Path, model: str, threads: int) -> Pupil:
        """Write the promoted model of the store ``source`` as a checkpoint of karpathy/nanochat, and import it.

        The new store has only the imported model. It is promoted.
        """
        prepare_cpu(threads)
        theirs, home = folder / "theirs", folder / "home"
        named = (f"--model={model}", "--revision=promoted", f"--home={source}")
        _run("jobs.train.export", *named, "--format=nanochat", f"--folder={theirs}")
        (weights,) = theirs.glob("*/*/model_*.pt")
        ours = (f"--home={home}", "--model=theirs")
        files = (f"--folder={weights.parent}", f"--tokenizer-folder={theirs / 'tokenizer'}")
        _run("jobs.train.import_nanochat", *ours, *files, "--stage=sft")
        _run("jobs.eval.gate", *ours, "--promote")
        return cls(home, "theirs", threads)

    @property
    def store(self) -> Store:
        return open_store(str(self.home))

    @property
    def served(self) -> CheckpointRef:
        """The promoted checkpoint."""
        found = promoted(self.store, self.model)
        assert found is not None, f"{self.home} has no promoted model {self.model}"
        return found

    def program(self, *arguments: str) -> str:
        """The output of ``nanochat teach`` with these arguments. A refused lesson is no error."""
        return _run("jobs.teach", self.model, *arguments, "--home", str(self.home))

    def teach(self, name: str, items: Sequence[Item], *flags: str) -> Lesson:
        """Give a lesson as the file ``name``.jsonl, and return its record."""
        file = self.home.parent / f"{name}.jsonl"
        file.write_bytes(to_lines(items))
        self.program(str(file), "--threads", str(self.threads), *flags)
        return lessons(self.store, self.model)[-1]

    def answers(self, ref: CheckpointRef, questions: Sequence[tuple[str, str]]) -> list[tuple[str, bool]]:
        """The greedy answers of a checkpoint to questions, and whether each contains the expected text."""
        task = GenerativeTask(
            "lessons",
            tuple(OpenQuestion(ask(question), expected, expected, _right) for question, expected in questions),
            tools=True,
            max_tokens=_MAX_TOKENS,
        )
        graded = answer_greedily(load_checkpoint(self.store, ref), task)
        return [(answer.answers[0].text.strip(), any(answer.right)) for answer in graded]


def _run(program: str, *arguments: str) -> str:
    """The output of one of the project's programs. A refusal of the promotion gate is no error."""
    done = subprocess.run([sys.executable, "-m", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, EXIT_REFUSED), done.stderr
    return done.stdout


def shares(lesson: Lesson) -> str:
    """The counts before and after a lesson, group by group."""
    return ", ".join(
        f"{name} {lesson.before[name]['right']} to {lesson.after[name]['right']} of {lesson.after[name]['asked']}"
        for name in lesson.after
        if "." not in name
    )


def broken_rules(lesson: Lesson) -> list[str]:
    """The reasons for which the gate refused a lesson."""
    rules: list[dict[str, Any]] = lesson.decision.get("rules", [])
    return [rule["reason"] for rule in rules if rule["passed"] is False]


def _right(expected: str, response: Response, _: SandboxExecutor) -> bool:
    return contains_phrase(expected, response.text)
