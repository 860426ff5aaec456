"""Train a tokenizer: ``python -m jobs.train.tokenizer``."""

import dataclasses
import functools
import logging
import operator
import time
from collections.abc import Iterable, Iterator

import rustbpe

from jobs.data.shards import TextDataset
from jobs.data.tokenizers import check_replaceable, save_tokenizer, tokenizer_key
from jobs.measures.compression import TEXT_BYTES, bytes_per_token, evaluate
from jobs.program import JobSettings, command_line, run_program
from nanochat_core.paths import check_name
from nanochat_core.settings import setting
from nanochat_core.store import Lease, open_store
from nanochat_core.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

log = logging.getLogger("jobs.train.tokenizer")

# Number of tokens that every vocabulary has: one for each of the 256 bytes, and the special tokens.
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenizerSettings(JobSettings):
    """Train a byte-level BPE tokenizer on a text dataset of the store."""

    dataset: str = setting(help="name of the dataset in the store")
    name: str = setting(help="name to save the tokenizer under")
    vocab_size: int = setting(
        32768, "largest size of the vocabulary, including the nine special tokens", minimum=SMALLEST_VOCABULARY
    )
    bytes_per_token: int = setting(
        50, "bytes of text that each token needs; a text that is too short gets a smaller vocabulary", minimum=1
    )
    document_characters: int = setting(10_000, "characters used from the start of each document", minimum=1)
    total_characters: int = setting(2_000_000_000, "characters used in total", minimum=1)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer on ``texts``.

    The tokenizer has fewer than ``vocab_size`` tokens if the texts have no more pairs to merge.
    """
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(iter(texts), vocab_size - len(SPECIAL_TOKENS), pattern=SPLIT_PATTERN)
    return Tokenizer([bytes(token) for token, _ in sorted(trainer.get_mergeable_ranks(), key=operator.itemgetter(1))])


def fitting_vocabulary(texts: Iterable[str], vocab_size: int, bytes_per_token: int) -> int:
    """The largest vocabulary, at most ``vocab_size``, for which the texts are long enough.

    A token that occurs only a few times costs parameters, but a model cannot learn its meaning. So each token beyond
    the bytes and the special tokens needs ``bytes_per_token`` bytes of text.
    """
    enough = (vocab_size - SMALLEST_VOCABULARY) * bytes_per_token
    total = 0
    for text in texts:
        total += len(text.encode())
        if total >= enough:
            return vocab_size
    return SMALLEST_VOCABULARY + total // bytes_per_token


def limited(texts: Iterable[str], document_characters: int, total_characters: int) -> Iterator[str]:
    """Yield the first ``document_characters`` characters of each text, until the total reaches ``total_characters``."""
    total = 0
    for text in texts:
        if total >= total_characters:
            return
        cut = text[:document_characters]
        total += len(cut)
        yield cut


def train_and_save(settings: TokenizerSettings) -> Tokenizer:
    """Train a tokenizer, measure its compression of each domain of text, and save the tokenizer and the measurement."""
    logging.getLogger("rustbpe").setLevel(logging.WARNING)  # because rustbpe logs every percent of its merges
    check_name(settings.name, "a tokenizer")
    store = open_store(settings.home)
    started = time.monotonic()
    with Lease(store, f"tokenizers/{settings.name}", "jobs.train.tokenizer"):
        check_replaceable(store, settings.name)
        training = TextDataset(store, settings.dataset, "train")
        texts = functools.partial(limited, training, settings.document_characters, settings.total_characters)
        tokenizer = train_tokenizer(texts(), fitting_vocabulary(texts(), settings.vocab_size, settings.bytes_per_token))
        if tokenizer.vocab_size < settings.vocab_size:
            log.warning(
                "the text is too short for --vocab-size, so the vocabulary is smaller",
                extra={"tokens": tokenizer.vocab_size, "wanted": settings.vocab_size},
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
