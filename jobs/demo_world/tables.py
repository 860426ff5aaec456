"""Reads the sentences and words of the demo world from the TOML files in ``content/``."""

import hashlib
import random
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, TypeAdapter

from nanochat_core.errors import UserError

FOLDER = Path(__file__).with_name("content")

T = TypeVar("T")
Split = Literal["train", "heldout"]
# Words that a TOML file holds as one text, separated by white space.
Words = Annotated[tuple[str, ...], BeforeValidator(lambda text: text.split() if isinstance(text, str) else text)]


class Table(BaseModel):
    """A table of a TOML file. A missing key, an unknown key and a value of another type are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Phrasings(Table):
    """Templates of the same question; training never uses the held-out templates."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def of(self, split: Split) -> tuple[str, ...]:
        return self.train if split == "train" else self.heldout


# Share of held-out questions for which draw_frame uses a phrasing of the training split. The share is high, because
# people mostly use common phrasings such as "What is 1234 * 5678?". The operands or words of such a question are still
# new to the model.
_SEEN_FRAME_SHARE = 0.5


def draw_frame(rng: random.Random, split: Split, phrasings: Phrasings) -> str:
    """Draw a phrasing for a question with numbers or words that only its split has.

    Half of the held-out questions get a phrasing of the training split.
    """
    seen = split == "heldout" and rng.random() < _SEEN_FRAME_SHARE
    return rng.choice(phrasings.of("train" if seen else split))


P = TypeVar("P", bound=Phrasings)


def draw_phrasings(rng: random.Random, questions: Sequence[P]) -> P:
    """Draw one of several questions; its probability is in proportion to its number of training phrasings."""
    return rng.choices(questions, [len(question.train) for question in questions])[0]


def is_heldout_by_hash(text: str, one_in: int) -> bool:
    """Whether the hash of a text puts it into the held-out split, to which one text in ``one_in`` belongs."""
    return hashlib.sha256(text.encode()).digest()[0] % one_in == 0


class WordLists(Phrasings):
    """Lists of words, one for each split."""

    train: Words
    heldout: Words


def read_content(name: str, kind: type[T]) -> T:
    """The content of ``content/<name>.toml``. If it is wrong, a UserError names the file and every wrong key."""
    path = FOLDER / f"{name}.toml"
    try:
        return TypeAdapter(kind).validate_python(tomllib.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path} cannot be used: {error}") from error
