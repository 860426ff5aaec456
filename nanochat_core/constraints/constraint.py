"""The pattern that a completion's text must match, and the error for a pattern that cannot be used."""

import dataclasses
import enum

from nanochat_core.errors import UserError


class ConstraintKind(enum.Enum):
    """The language of a :class:`Constraint`."""

    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    TEXT_OR_JSON_SCHEMA = "text_or_json_schema"


@dataclasses.dataclass(frozen=True)
class Constraint:
    """A pattern that a completion's text must match. A constrained completion contains no special tokens.

    ``source`` is a JSON schema or a regular expression for the whole text; it is empty if any JSON object is allowed.
    With ``TEXT_OR_JSON_SCHEMA``, only text that begins with ``{`` must follow the schema.
    """

    kind: ConstraintKind
    source: str = ""


class ConstraintError(UserError):
    """A constraint cannot be used. ``kind`` names the field of the request that is wrong; ``reason`` says why."""

    def __init__(self, kind: ConstraintKind, reason: str) -> None:
        super().__init__(f"the {kind.value} cannot be used: {reason}")
        self.kind = kind
        self.reason = reason
