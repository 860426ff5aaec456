"""Compiles a constraint with llguidance to a grammar over the tokens of a model."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanochat_core.constraints.constraint import Constraint, ConstraintError, ConstraintKind
from nanochat_core.tokenizer import ASSISTANT_END, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MAX_SOURCE_CHARACTERS = 65_536

# Generated JSON has no white space between its parts except, optionally, one space after each comma and each colon. If
# white space of any length were allowed, a weak model might write it without end.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# Grammar of the kind TEXT_OR_JSON_SCHEMA. The first character decides: text that begins with a brace must match the
# schema, and all other text is allowed.
_TEXT_OR_JSON = "start: (TEXT | json)?\nTEXT: /[^{](.|\\n)*/\njson: %json "
# All numbers except ``max_items_in_row`` are lower than the defaults of llguidance, because the defaults allow each
# sequence 250,000 lexer states of about 2 kB each, and 14 ms per step.
_LIMITS: Mapping[str, Any] = {
    "initial_lexer_fuel": 50_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 20_000,
    "max_items_in_row": 20_000,  # this limit is high, because an object needs four items for each optional property
    "precompute_large_lexemes": False,  # precomputing slows compilation down and does not make steps faster
    "verbose_errors": False,  # verbose errors quote the schema and the answer, but logs must contain neither
}


class Compiler:
    """Compiles constraints for one tokenizer. Any thread may use it, and other threads run during a compilation.

    llguidance does not limit the cost of a compilation; :class:`~nanochat_core.constraints.trial.Trial` does.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """``vocab_size`` is the number of the model's logits. The tokenizer's vocabulary may be smaller."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.end = tokenizer.special_ids[ASSISTANT_END]

    def compile(self, constraint: Constraint) -> LLMatcher:
        """Return a matcher at the beginning of the constraint's grammar.

        A constraint that is malformed, unsupported or too large, or that no text matches, raises a
        :class:`ConstraintError`.
        """
        from llguidance import LLMatcher

        kind, source = constraint.kind, constraint.source
        check_length(constraint)
        if kind is ConstraintKind.REGEX:
            grammar = LLMatcher.grammar_from_regex(source)
        else:
            schema = read_schema(constraint)
            try:
                if kind is ConstraintKind.TEXT_OR_JSON_SCHEMA:
                    guided = schema | {"x-guidance": _JSON_OPTIONS}
                    grammar = LLMatcher.grammar_from_lark(_TEXT_OR_JSON + json.dumps(guided))
                else:
                    grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
            except ValueError as error:
                raise ConstraintError(kind, short_reason(str(error))) from error
        vocabulary, limits = self._library
        matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            # Computing the first mask builds much of the grammar, and fails if no text matches.
            matcher.compute_bitmask()
        if matcher.is_error():
            reason = short_reason(matcher.get_error())
            raise ConstraintError(kind, "nothing matches it" if reason == "NoExtensionBias" else reason)
        return matcher

    @functools.cached_property
    def _library(self) -> tuple[LLTokenizer, LLParserLimits]:
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        wrapped = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self.end))
        return LLTokenizer(wrapped), LLParserLimits(**_LIMITS)


class _Vocabulary:
    """The tokenizer in the form that llguidance reads."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int) -> None:
        unused = range(tokenizer.vocab_size, vocab_size)
        self.eos_token_id = end
        self.tokens = [
            *tokenizer.token_bytes,
            *(name.encode() for name in tokenizer.special_ids),
            *(f"<|unused_{i}|>".encode() for i in unused),
        ]
        self.special_token_ids = [*tokenizer.special_ids.values(), *unused]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", errors="replace"))


def check_length(constraint: Constraint) -> None:
    """Raise a :class:`ConstraintError` if the source is too long to be read at all."""
    length = len(constraint.source)
    if length > MAX_SOURCE_CHARACTERS:
        reason = f"it has {length} characters; at most {MAX_SOURCE_CHARACTERS} are possible"
        raise ConstraintError(constraint.kind, reason)


def read_schema(constraint: Constraint) -> dict[str, Any]:
    """Return the JSON schema of a constraint that is not a regular expression.

    Raises a :class:`ConstraintError` if the source is not a JSON object.
    """
    if constraint.kind is ConstraintKind.JSON_OBJECT:
        return {"type": "object"}
    try:
        schema = json.loads(constraint.source)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(constraint.kind, f"it is not valid JSON ({error})") from error
    if not isinstance(schema, dict):
        raise ConstraintError(constraint.kind, "a schema is a JSON object")
    schema.pop("x-guidance", None)  # removed, because llguidance reads options here that can switch checks off
    return schema


def short_reason(message: str) -> str:
    """Return an error message without positions in the generated grammar, which mean nothing to the user."""
    message = re.sub(r"^at \d+\(\d+\): .*?\(in regex\): ", "", message, flags=re.DOTALL)
    message = re.sub(r"^at \d+\(\d+\): ", "", message)
    message = re.split(r"\n\s*\d+ \| |\n<", message)[0]
    return " ".join(message.split())[:500]
