"""Ask a model 200 first messages of visitors, and count the answers that a reader finds sensible.

Run the program from the project's root after ``make run`` has trained the demo model:
``python -m tests.benchmarks.visitors answer --home .nanochat > answers.jsonl``. Each line has a message and the model's
answer. A reader, who does not know how the model was trained, adds ``"sensible": true`` or ``false`` to each line, by
the rules of ``rubric.md``. ``python -m tests.benchmarks.visitors count answers.jsonl`` then prints the share of
sensible answers for each kind of message.

The messages were written by somebody who knew neither the code nor the training data. The training conversations
were written without a look at the messages. Still, some short messages, such as "hi" and "thanks", are in the training
conversations too. So ``count`` also gives the share among the messages that no training conversation contains.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from jobs.demo_world.conversations import conversations
from jobs.eval.chat_eval.evaluate_tasks import answer_greedily
from jobs.recipes import RECIPES
from jobs.tasks.task import GenerativeTask, OpenQuestion
from nanochat_core.checkpoint import load_checkpoint, promoted
from nanochat_core.store import open_store

HERE = Path(__file__).parent
MOST_TOKENS = 300


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(home: str, model: str) -> Iterator[dict[str, Any]]:
    """Each message, with the greedy answer of the promoted revision of ``model`` and the Python calls of the answer."""
    store = open_store(home)
    if (ref := promoted(store, model)) is None:
        sys.exit(f"no revision of {model} is promoted in {home}; train it first: make run")
    messages = read(HERE / "messages.jsonl")
    # The task accepts every answer, because a reader judges the answers later.
    questions = [
        OpenQuestion(({"role": "user", "content": each["text"]},), "", "", lambda *_: True, each["kind"])
        for each in messages
    ]
    task = GenerativeTask("visitors", tuple(questions), tools=True, max_tokens=MOST_TOKENS)
    for message, graded in zip(messages, answer_greedily(load_checkpoint(store, ref), task), strict=True):
        (answer,) = graded.answers
        yield {**message, "answer": answer.text, "calls": answer.tool_calls}


def plain(text: str) -> str:
    """The message without capitals and final punctuation, so that messages can be compared."""
    return text.lower().rstrip("?.! ")


def trained() -> set[str]:
    """The users' messages of all training conversations of the demo model, as :func:`plain` writes them."""
    drawn = conversations("train", seed=1, n=RECIPES["demo"].train_conversations)
    return {plain(each["content"]) for one in drawn for each in one["messages"] if each["role"] == "user"}


def count(judged: Iterable[dict[str, Any]], known: set[str]) -> list[str]:
    """Lines with the share of sensible answers: for each kind, for all messages, and for messages not in ``known``.

    Args:
        judged: messages with their ``kind``, ``text`` and ``sensible``.
        known: messages of the training conversations, as :func:`plain` writes them.
    """
    groups: dict[str, list[bool]] = {}
    for each in judged:
        new = ["not in training"] if plain(each["text"]) not in known else []
        for group in (each["kind"], "all", *new):
            groups.setdefault(group, []).append(each["sensible"])
    return [
        f"{group}: {sum(found)} of {len(found)} sensible ({100 * sum(found) / len(found):.1f} %)"
        for group, found in sorted(groups.items(), key=lambda each: len(each[1]))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    asking = commands.add_parser("answer")
    asking.add_argument("--home", default=".nanochat")
    asking.add_argument("--model", default="demo")
    commands.add_parser("count").add_argument("judged", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "answer":
        for each in answers(arguments.home, arguments.model):
            print(json.dumps(each, ensure_ascii=False))
    else:
        print("\n".join(count(read(arguments.judged), trained())))


if __name__ == "__main__":
    main()
