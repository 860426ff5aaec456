"""Constrained decoding: completions that match a JSON schema or a regular expression.

The library llguidance compiles the constraint to a grammar over the model's tokens. Each completion has a matcher,
which follows the completion's tokens through the grammar and says which tokens may come next. The result depends only
on the constraint and the completion's tokens, so preemption, recomputation and the rest of the batch do not change it.

The first constrained request loads the library.
"""

from __future__ import annotations

import collections
import functools
import json
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanochat_core.engine.request import Constraint, ConstraintKind
from nanochat_core.errors import UserError
from nanochat_core.tokenizer import ASSISTANT_END, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

log = logging.getLogger(__name__)

# Number of compiled grammars kept for later requests with the same constraint.
CACHED_GRAMMARS = 64
MAX_SOURCE_CHARACTERS = 65_536
# The library expands counted repetitions before the first token. Expanding this many characters takes about 20 ms.
MAX_REPEATED_CHARACTERS = 20_000

# Generated JSON has at most one space between its parts, like the output of json.dumps. If any white
# space were allowed, a weak model might write it without end.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
# These limits are lower than the defaults of llguidance. The defaults allow each sequence 250,000 states of about 2 kB
# each, and 14 ms per step.
_LIMITS: Mapping[str, Any] = {
    "initial_lexer_fuel": 50_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 20_000,
    "max_items_in_row": 20_000,  # an object needs four items for each optional property
    "precompute_large_lexemes": False,  # True slows compilation down and does not speed steps up
    "verbose_errors": False,  # verbose errors quote the schema and the answer
}


class ConstraintError(UserError):
    """A constraint cannot be used. ``kind`` names the field of the request that is wrong."""

    def __init__(self, kind: ConstraintKind, reason: str) -> None:
        super().__init__(f"the {kind.value} cannot be used: {reason}")
        self.kind = kind


class Matcher:
    """Follows one completion and says which tokens may come next."""

    def __init__(self, matcher: LLMatcher, end: int, stops: Iterable[int]) -> None:
        """``matcher`` is at the beginning of its grammar, and no other object uses ``matcher``.

        ``end`` is the token that ends a text in the matcher's tokenizer. Each of the tokens ``stops`` ends the
        completion.
        """
        self._matcher = matcher
        self._end = end
        self._stops = sorted(stops)
        # Whether :meth:`fill` found that no token may follow. The engine then ignores the next sampled token.
        self.stuck = False

    @property
    def complete(self) -> bool:
        """Whether the text so far matches."""
        return self._matcher.is_accepting() and not self._matcher.is_error()

    @property
    def failed(self) -> bool:
        """Whether a token did not continue a match, or the matcher reached a limit."""
        return self._matcher.is_error()

    def advance(self, token: int) -> bool:
        """Follow the next token, which is no stop token. Returns whether the text matches and cannot become longer."""
        self._matcher.consume_token(token)
        return self._matcher.is_stopped() and self.complete

    def fill(self, mask: npt.NDArray[np.int32]) -> None:
        """Find the tokens that may follow: those that continue a match, and the stop tokens if the text matches.

        If only one text can follow, only the first token of its encoding is allowed. ``mask`` (ceil(vocab_size / 32),)
        is contiguous and receives one bit per token, the lowest bit first. If no token may follow, all bits are set and
        :attr:`stuck` becomes True.
        """
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        # After an error the matcher allows only the end of the text, even if the text does not match.
        complete = self.complete
        _set_bit(mask, self._end, False)
        for token in self._stops:
            _set_bit(mask, token, complete)
        if not mask.any():
            self.stuck = True
            mask.fill(-1)
            if self._matcher.is_error():
                log.warning("constraint gave up", extra={"reason": _reason(self._matcher.get_error())})


class Grammars:
    """Compiles constraints for one tokenizer and caches the results. It is thread-safe."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """``vocab_size`` is the number of the model's logits. The tokenizer's vocabulary may be smaller."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end = tokenizer.special_ids[ASSISTANT_END]
        self._lock = threading.Lock()
        self._compiled: collections.OrderedDict[Constraint, LLMatcher] = collections.OrderedDict()

    def compile(self, constraint: Constraint) -> LLMatcher:
        """Return a matcher at the beginning of the constraint's grammar. Callers share the matcher; copy it before use.

        A constraint that is malformed, unsupported or too large, or that no text matches, raises a
        :class:`ConstraintError`.
        """
        with self._lock:
            if (known := self._compiled.get(constraint)) is not None:
                self._compiled.move_to_end(constraint)
                return known
            vocabulary, limits = self._library
        # The lock is not held during the compilation, because the device loop may need a grammar that is already
        # compiled.
        matcher = compile_constraint(constraint, vocabulary, limits)
        with self._lock:
            self._compiled[constraint] = matcher
            while len(self._compiled) > CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        return matcher

    def matcher(self, constraint: Constraint, stops: Iterable[int]) -> Matcher:
        """A matcher for a new completion that ends with one of ``stops``."""
        return Matcher(self.compile(constraint).deep_copy(), self._end, stops)

    @functools.cached_property
    def _library(self) -> tuple[LLTokenizer, LLParserLimits]:
        from llguidance import LLParserLimits, LLTokenizer, TokenizerWrapper

        wrapped = TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._end))
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


def compile_constraint(constraint: Constraint, vocabulary: LLTokenizer, limits: LLParserLimits) -> LLMatcher:
    """Compile one constraint; see :meth:`Grammars.compile`, which caches the result."""
    from llguidance import LLMatcher

    kind, source = constraint.kind, constraint.source
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise ConstraintError(kind, f"it has {len(source)} characters; at most {MAX_SOURCE_CHARACTERS} are possible")
    if kind is ConstraintKind.REGEX:
        _check_patterns(kind, [source])
        grammar = LLMatcher.grammar_from_regex(source)
    else:
        schema = _read_schema(constraint)
        _check_patterns(kind, _patterns(schema))
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON_OPTIONS)
        except ValueError as error:
            raise ConstraintError(kind, _reason(str(error))) from error
    matcher = LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        # Computing the first mask builds much of the grammar, and fails if no text matches.
        matcher.compute_bitmask()
    if matcher.is_error():
        reason = _reason(matcher.get_error())
        raise ConstraintError(kind, "nothing matches it" if reason == "NoExtensionBias" else reason)
    return matcher


def _read_schema(constraint: Constraint) -> dict[str, Any]:
    if constraint.kind is ConstraintKind.JSON_OBJECT:
        return {"type": "object"}
    try:
        schema = json.loads(constraint.source)
    except (ValueError, RecursionError) as error:
        raise ConstraintError(constraint.kind, f"it is not valid JSON ({error})") from error
    if not isinstance(schema, dict):
        raise ConstraintError(constraint.kind, "a schema is a JSON object")
    schema.pop("x-guidance", None)  # llguidance's options, with which a schema could switch checks off
    return schema


def _patterns(schema: Any) -> Iterator[str]:
    """Yield every regular expression of a schema, found by the keys ``pattern`` and ``patternProperties``.

    A schema may also use these keys for other purposes, so some of the strings may not be regular expressions.
    """
    unread = [schema]
    while unread:
        node = unread.pop()
        if isinstance(node, dict):
            if isinstance(pattern := node.get("pattern"), str):
                yield pattern
            if isinstance(by_pattern := node.get("patternProperties"), dict):
                yield from by_pattern
            unread += node.values()
        elif isinstance(node, list):
            unread += node


def _check_patterns(kind: ConstraintKind, patterns: Iterable[str]) -> None:
    """Refuse patterns whose expansion takes seconds and gigabytes. The library has no limit for this."""
    total = sum(expanded_length(kind, pattern) for pattern in patterns)
    if total > MAX_REPEATED_CHARACTERS:
        raise ConstraintError(
            kind,
            f"with its counted repetitions expanded a regular expression has {total} characters; "
            f"at most {MAX_REPEATED_CHARACTERS} are possible",
        )


_VERBOSE = re.compile(r"\?[A-Za-z]*x[A-Za-z-]*[:)]")
_PIECE = re.compile(r"\\[pPxuU]\{[^}]*\}|\\.|\{(?P<least>\d*)(?:,(?P<most>\d*))?\}|.", re.DOTALL)


def expanded_length(kind: ConstraintKind, pattern: str) -> int:
    """Number of characters and classes of ``pattern`` after every ``{m,n}`` is expanded, or slightly more.

    The function also accepts invalid patterns; the library refuses them later. The verbose flag allows white space and
    comments in a pattern. It is not supported here and raises a :class:`ConstraintError`.
    """
    groups = [0]  # for each open group, its size so far
    last = 0  # size of the last item; a repetition applies to this item
    position = 0
    while position < len(pattern):
        if pattern[position] == "[":
            position, last = _class_end(pattern, position), 1
            groups[-1] += 1
            continue
        match = _PIECE.match(pattern, position)
        assert match is not None, "a piece is at least one character"
        position, piece = match.end(), match[0]
        if piece.startswith("{") and len(piece) > 1:
            # Nine digits are enough to see that a number is too large.
            most = max(int((match[name] or "").lstrip("0")[:9] or 1) for name in ("least", "most"))
            groups[-1] += last * (most - 1)
            last *= most
        elif piece == "(":
            if _VERBOSE.match(pattern, position):
                raise ConstraintError(kind, "the flag x of regular expressions is not supported")
            groups.append(0)
        elif piece == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif piece not in ("*", "+", "?"):
            groups[-1] += 1
            last = 1
    return sum(groups)


def _class_end(pattern: str, start: int) -> int:
    """Index after the character class that opens at ``start``. Classes can be nested, as in ``[a-z&&[^aeiou]]``."""
    depth, position = 0, start
    while position < len(pattern):
        character = pattern[position]
        position += 1
        if character == "\\":
            position += 1
        elif character == "[":
            depth += 1
            position += pattern.startswith("^", position)
            position += pattern.startswith("]", position)  # a ] right after [ or [^ is literal
        elif character == "]":
            depth -= 1
            if depth == 0:
                return position
    return len(pattern)


def _reason(message: str) -> str:
    """Remove positions in the generated grammar from an error message, because they mean nothing to the user."""
    message = re.sub(r"^at \d+\(\d+\): .*?\(in regex\): ", "", message, flags=re.DOTALL)
    message = re.split(r"\n\s*\d+ \| |\n<", message)[0]
    return " ".join(message.split())[:500]


def _set_bit(mask: npt.NDArray[np.int32], bit: int, value: bool) -> None:
    word, position = divmod(bit, 32)
    flag = np.uint32(1 << position).view(np.int32)
    mask[word] = mask[word] | flag if value else mask[word] & ~flag
