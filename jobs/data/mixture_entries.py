"""The entries of a mixture: names of datasets or tasks with weights, such as ``books:3,code``."""

import dataclasses

from nanochat_core.errors import UserError

# Largest weight. In fine-tuning, a weight is the number of times that an epoch shows a source, so a larger weight must
# be a mistake.
MOST_WEIGHT = 1_000_000


@dataclasses.dataclass(frozen=True)
class Entry:
    """One source of a mixture, and its weight above 0."""

    name: str
    weight: float


def parse_mixture(text: str) -> list[Entry]:
    """Parse comma-separated entries of the form ``name[:weight]``. The default weight is 1.

    Raises UserError for any other text, for a weight that is not above 0 or is above :data:`MOST_WEIGHT`, and for a
    name that occurs twice.
    """
    entries: list[Entry] = []
    for part in text.split(","):
        name, colon, weight = part.strip().rpartition(":")
        if not colon:
            name, weight = weight, "1"
        if not name:
            raise UserError(f"the mixture {text!r} has an entry without a name; write NAME or NAME:WEIGHT, …")
        try:
            entry = Entry(name, float(weight))
        except ValueError:
            raise UserError(f"the mixture gives {name} the weight {weight!r}, which is not a number") from None
        if not entry.weight > 0:
            raise UserError(f"the mixture gives {name} the weight {weight}; it must be above 0")
        if entry.weight > MOST_WEIGHT:
            raise UserError(f"the mixture gives {name} the weight {weight}; it must be at most {MOST_WEIGHT:,}")
        if any(other.name == name for other in entries):
            raise UserError(f"the mixture names {name} twice; give it a weight instead: {name}:2")
        entries.append(entry)
    return entries
