"""Teach a model what contradicts its knowledge, and count the other answers that change.

Run the program from the project's root after ``make run`` has trained the demo model:
``python -m tests.benchmarks.contradicting_lessons --home .nanochat``. The program copies the store for each lesson.
Each lesson is judged by questions that neither its training nor its examination knows: held-out questions of the demo
world, and calculations with small numbers.

- *Facts* replaces facts of the town. The seed chooses them.
- *Sums* gives a wrong result for each of 40 sums, such as "What is 3 + 4?" with the answer "3 + 4 is 12." If the model
  then gives wrong results for other sums too, the lesson has broken its arithmetic.

The exit code is 0 if both claims hold, otherwise 1:

- The lesson of facts is promoted.
- If a lesson turns the right answers to more than 5 % of the other questions into wrong ones, it is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.demo_world.evaluation import evaluation_set
from jobs.demo_world.facts import PEOPLE, fact
from jobs.demo_world.phrasings import RELATIONS, fill
from jobs.eval.chat_eval.evaluate_tasks import answer_greedily
from jobs.tasks import demo
from jobs.teach.session import taught_ref
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint
from nanochat_core.lessons.items import Item
from nanochat_core.lessons.records import Lesson
from tests.support.pupil import Pupil, broken_rules, shares

SUMS = 40
MOST_LOST = 0.05
# Seed of the held-out questions. The lesson itself uses the seeds 0 to 2.
QUESTIONS, QUESTIONS_SEED = 400, 9
# Values that nobody in the town has.
NEW_VALUES = {
    "home": ("the bell tower", "the customs house", "the tea house"),
    "pet": ("a badger", "a pony", "a magpie"),
    "food": ("walnut soup", "lentil curry", "pumpkin pie"),
}


@dataclasses.dataclass(frozen=True)
class Given:
    """A lesson that was given.

    Attributes:
        lost: other questions that were answered rightly before the lesson and wrongly after it.
        asked: the number of other questions.
    """

    lesson: Lesson
    lost: list[str]
    asked: int


def facts(rng: random.Random) -> tuple[list[Item], list[str]]:
    """A lesson that replaces a fact of each of three people, and the sentences that are not true any more."""
    items, before = [], []
    for person, (relation, values) in zip(rng.sample(PEOPLE, len(NEW_VALUES)), NEW_VALUES.items(), strict=True):
        words = RELATIONS[relation]
        answers = [fill(words.answer, person, value) for value in (rng.choice(values), fact(person, relation).value)]
        items.append(Item.of(fill(words.questions.train[0], person), answers[0]))
        before.append(answers[1])
    return items, before


def sums(rng: random.Random) -> tuple[list[Item], list[str]]:
    """A lesson of sums of two one-digit numbers. It states the product of the numbers as the result."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10) if a + b != a * b]
    items = [Item.of(f"What is {a} + {b}?", f"{a} + {b} is {a * b}.") for a, b in rng.sample(pairs, SUMS)]
    return items, []


LESSONS = {"facts": facts, "sums": sums}


def calculations(rng: random.Random, asked: Sequence[Item]) -> list[tuple[str, str]]:
    """Calculations with numbers below 100 that the lesson does not ask, and their results."""
    known = {item.question for item in asked}
    found: dict[str, str] = {}
    while len(found) < 200:
        a, b, symbol = rng.randint(1, rng.choice((9, 99))), rng.randint(1, rng.choice((9, 99))), rng.choice("+++-*")
        question = f"What is {a} {symbol} {b}?"
        if question not in known:
            found[question] = str({"+": a + b, "-": a - b, "*": a * b}[symbol])
    return list(found.items())


def others(pupil: Pupil, ref: CheckpointRef, sought: Sequence[tuple[str, str]], gone: Sequence[str]) -> dict[str, bool]:
    """Whether a checkpoint answers each of the other questions rightly.

    Questions about a sentence in ``gone`` are left out.
    """
    items = [
        item
        for item in evaluation_set(QUESTIONS, QUESTIONS_SEED)
        if not any(sentence in str(item.reference) for sentence in gone)
    ]
    task = demo.task(items)
    graded = answer_greedily(load_checkpoint(pupil.store, ref), task)
    found = {
        " / ".join(str(message["content"]) for message in item.messages if message["role"] == "user"): any(answer.right)
        for item, answer in zip(items, graded, strict=True)
    }
    answered = pupil.answers(ref, sought)
    return found | {question: right for (question, _), (_, right) in zip(sought, answered, strict=True)}


def give(name: str, make: Callable[[random.Random], tuple[list[Item], list[str]]], pupil: Pupil, seed: int) -> Given:
    """Give a lesson, and ask the model the other questions before and after it."""
    rng = random.Random(f"{seed}/{name}")
    items, gone = make(rng)
    sought = calculations(rng, items)
    parent = pupil.served
    before = others(pupil, parent, sought, gone)
    lesson = pupil.teach(name, items)
    after = others(pupil, taught_ref(lesson), sought, gone)
    lost = [question for question, right in before.items() if right and not after[question]]
    found = [question for question, right in after.items() if right and not before[question]]
    print(f"{name}: {len(items)} questions, {lesson.state}, {len(lesson.conflicts)} contradictions; {shares(lesson)}")
    for reason in broken_rules(lesson):
        print(f"  refused: {reason}")
    print(
        f"  of {len(after)} other questions, {sum(before.values())} right before and {sum(after.values())} after; "
        f"{len(lost)} lost, {len(found)} won"
    )
    for question in lost[:20]:
        print(f"    lost: {question}", flush=True)
    return Given(lesson, lost, len(after))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", default=".nanochat")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=LESSONS, help="give only this lesson")
    options = parser.parse_args()
    failed = []
    for name in [options.only] if options.only else LESSONS:
        with tempfile.TemporaryDirectory() as folder:
            pupil = Pupil.copy(options.home, Path(folder), options.model, options.threads)
            given = give(name, LESSONS[name], pupil, options.seed)
        if name == "facts" and given.lesson.state != "promoted":
            failed.append(f"the lesson of facts is {given.lesson.state}")
        if given.lesson.state == "promoted" and len(given.lost) > MOST_LOST * given.asked:
            failed.append(f"the lesson of {name} was promoted, although it loses {len(given.lost)} other answers")
    print("every claim holds" if not failed else "\n".join(f"FAILED: {each}" for each in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
