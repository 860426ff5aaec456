"""Train a tokenizer: ``python -m jobs.train.tokenizer``."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator

import rustbpe

from jobs.data.shards import TextDataset
from jobs.data.tokenizers import save_tokenizer, tokenizer_key
from jobs.measures.compression import TEXT_BYTES, bytes_per_token, evaluate
from jobs.program import JobSettings, command_line, run_program
from nanochat_core.errors import UserError
from nanochat_core.settings import setting
from nanochat_core.store import open_store
from nanochat_core.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

log = logging.getLogger("jobs.train.tokenizer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings(JobSettings):
    """Train a byte-level BPE tokenizer on a text dataset of the store."""

    dataset: str = setting(help="name of the dataset in the store")
    name: str = setting(help="name to save the tokenizer under")
    vocab_size: int = setting(32768, "size of the vocabulary, including the nine special tokens", minimum=265)
    document_characters: int = setting(10_000, "characters used from the start of each document", minimum=1)
    total_characters: int = setting(2_000_000_000, "characters used in total", minimum=1)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on ``texts``.

    Raises UserError if the texts are too short for the vocabulary.
    """
    trainer = rustbpe.Tokenizer()
    ordinary = vocab_size - len(SPECIAL_TOKENS)
    trainer.train_from_iterator(iter(texts), ordinary, pattern=SPLIT_PATTERN)
    ranks = sorted((rank, bytes(token)) for token, rank in trainer.get_mergeable_ranks())
    if len(ranks) != ordinary:
        raise UserError(
            f"the text yields only {len(ranks)} of the {ordinary} tokens asked for; use more text or fewer tokens"
        )
    return Tokenizer([token for _, token in ranks])


def limited(texts: Iterable[str], document_characters: int, total_characters: int) -> Iterator[str]:
    """Yield the start of each text, until the total number of characters is reached."""
    total = 0
    for text in texts:
        if total >= total_characters:
            return
        cut = text[:document_characters]
        total += len(cut)
        yield cut


def train_and_save(settings: TokenizerSettings) -> Tokenizer:
    """Train a tokenizer, measure its compression of each domain of text, and save both."""
    logging.getLogger("rustbpe").setLevel(logging.WARNING)  # rustbpe logs every percent of its merges.
    store = open_store(settings.home)
    started = time.monotonic()
    training = TextDataset(store, settings.dataset, "train")
    tokenizer = train_tokenizer(
        limited(training, settings.document_characters, settings.total_characters), settings.vocab_size
    )
    evaluation = evaluate(store, settings.name, tokenizer, settings.dataset, TEXT_BYTES)
    save_tokenizer(store, settings.name, tokenizer, settings.dataset)
    log.info(
        "tokenizer trained",
        extra={
            "tokenizer": f"{store}/{tokenizer_key(settings.name)}",
            "vocab_size": tokenizer.vocab_size,
            "seconds": round(time.monotonic() - started, 2),
            "bytes_per_token": {text: round(bytes_per_token(evaluation, text), 3) for text in evaluation["texts"]},
            "next": [
                command_line(
                    "jobs.train.pretrain",
                    model=settings.name,
                    dataset=settings.dataset,
                    tokenizer=settings.name,
                    home=settings.home,
                )
            ],
        },
    )
    return tokenizer


if __name__ == "__main__":
    run_program("jobs.train.tokenizer", "tokenizer", TokenizerSettings, train_and_save)
