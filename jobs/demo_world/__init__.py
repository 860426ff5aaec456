"""The demo world: a harbour town small enough that a model of a few million parameters knows all of it.

A generator without files or network, so that a fresh clone can train and test a chat model in minutes. Everything
follows from explicit seeds. What held-out conversations test (phrasings, numbers, words, strangers) is kept out of
training by construction; the facts are the same on both sides.
"""

from jobs.demo_world.conversations import CONVERSATION_MIX, conversations
from jobs.demo_world.documents import DOCUMENT_MIX, pretraining_documents
from jobs.demo_world.evaluation import EVALUATION_MIX, EvalItem, check, evaluation_set
from jobs.demo_world.phrasings import Split

__all__ = [
    "CONVERSATION_MIX",
    "DOCUMENT_MIX",
    "EVALUATION_MIX",
    "EvalItem",
    "Split",
    "check",
    "conversations",
    "evaluation_set",
    "pretraining_documents",
]
