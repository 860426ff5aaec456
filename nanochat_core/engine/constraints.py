"""Constrained decoding: completions that match a JSON schema or a regular expression.

The library llguidance compiles the constraint to a grammar over the model's tokens. Each completion has a matcher,
which follows the completion's tokens through the grammar and says which tokens may come next. The result depends only
on the constraint and the completion's tokens, so preemption, recomputation and the rest of the batch do not change the
result.

The first constrained request loads llguidance.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nanochat_core.constraints.compiler import Compiler, short_reason
from nanochat_core.constraints.constraint import Constraint, ConstraintError
from nanochat_core.constraints.trial import MOST_STEP_SECONDS, Trial, slow_step
from nanochat_core.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

log = logging.getLogger(__name__)

# Maximum total size in bytes of the grammars and refusals that are kept for later requests. The newest one is always
# kept, even if it alone is larger.
CACHE_BYTES = 64 << 20
# Every grammar or refusal counts as at least this many bytes. A smaller size cannot be measured, because the
# operating system counts a process's memory in steps of 256 KiB.
LEAST_BYTES = 512 << 10


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A compiled constraint.

    Attributes:
        constraint: the constraint itself.
        matcher: a matcher that stays at the beginning of the grammar; each completion advances a copy.
        bytes: size of the grammar in memory.
    """

    constraint: Constraint
    matcher: LLMatcher
    bytes: int


class Matcher:
    """Follows one completion and says which tokens may come next."""

    def __init__(
        self, matcher: LLMatcher, end: int, stops: Iterable[int], on_slow: Callable[[], None] = lambda: None
    ) -> None:
        """``matcher`` is at the beginning of its grammar, and no other object uses ``matcher``.

        ``end`` is the token that ends a text in the matcher's tokenizer. Each of the tokens ``stops`` ends the
        completion. ``on_slow`` is called each time that :meth:`fill` needs more CPU time than
        :data:`MOST_STEP_SECONDS` to find the tokens.
        """
        self._on_slow = on_slow
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
        """Whether a token broke the constraint, or the matcher reached a limit of llguidance."""
        return self._matcher.is_error()

    def advance(self, token: int) -> bool:
        """Follow the next token, which is no stop token. Returns whether the text matches and cannot become longer."""
        self._matcher.consume_token(token)
        return self._matcher.is_stopped() and self.complete

    def fill(self, mask: npt.NDArray[np.int32]) -> None:
        """Find the tokens that may follow: those that continue a match, and the stop tokens if the text matches.

        If all texts that can follow begin alike, llguidance may allow only the first token of the encoding of this
        common beginning. ``mask`` (ceil(vocab_size / 32),) is contiguous and receives one bit per token, the lowest bit
        first. If no token may follow, all bits are set and :attr:`stuck` becomes True.
        """
        began = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if time.thread_time() - began > MOST_STEP_SECONDS:
            self._on_slow()
        # The matcher's answer about the end of the text is not used: after an error, the matcher allows only the end of
        # the text, even if the text does not match.
        complete = self.complete
        _set_bit(mask, self._end, False)
        for token in self._stops:
            _set_bit(mask, token, complete)
        if not mask.any():
            self.stuck = True
            mask.fill(-1)
            if self._matcher.is_error():
                log.warning("constraint failed", extra={"reason": short_reason(self._matcher.get_error())})


class Grammars:
    """Compiles constraints for one tokenizer and caches the outcomes: grammars and refusals. Any thread may use it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """``vocab_size`` is the number of the model's logits. The tokenizer's vocabulary may be smaller."""
        self._compiler = Compiler(tokenizer, vocab_size)
        self.new_trial = functools.partial(Trial, tokenizer, vocab_size)
        self._lock = threading.Lock()
        # Grammars, or the reasons of refusals, by the digest of the constraint. The most recently used entry comes
        # last.
        self._outcomes: collections.OrderedDict[bytes, Grammar | str] = collections.OrderedDict()
        self._bytes = 0

    def known(self, constraint: Constraint) -> Grammar | None:
        """Return the cached grammar of a constraint; None if the cache has no outcome for the constraint.

        If the cached outcome is a refusal, the same :class:`ConstraintError` is raised again.
        """
        digest = _digest(constraint)
        with self._lock:
            outcome = self._outcomes.get(digest)
            if outcome is not None:
                self._outcomes.move_to_end(digest)
        if isinstance(outcome, str):
            raise ConstraintError(constraint.kind, outcome)
        return outcome

    def compile(self, constraint: Constraint, trial: Trial | None = None) -> Grammar:
        """Return the grammar of a constraint.

        If the constraint is new, ``trial`` bounds the cost of its compilation. Without a trial, the cost has no bound,
        so the constraint must not come from a client.

        Raises:
            ConstraintError: the constraint is malformed, unsupported or too expensive, or no text matches it.
            TrialEnded: ``trial`` was ended.
        """
        if (known := self.known(constraint)) is not None:
            return known
        try:
            taken = trial.run(constraint) if trial else 0
            grammar = Grammar(constraint, self._compiler.compile(constraint), max(taken, LEAST_BYTES))
        except ConstraintError as error:
            self._keep(constraint, error.reason)
            raise
        self._keep(constraint, grammar)
        return grammar

    def matcher(self, grammar: Grammar, stops: Iterable[int]) -> Matcher:
        """A matcher for a new completion that ends with one of ``stops``.

        If a step needs too much CPU time although the trial found no slow step, the completion continues, and later
        requests with the constraint are refused.
        """

        def on_slow() -> None:
            log.warning("constraint with a slow step", extra={"kind": grammar.constraint.kind.value})
            self._keep(grammar.constraint, slow_step(grammar.constraint))

        return Matcher(grammar.matcher.deep_copy(), self._compiler.end, stops, on_slow)

    def _keep(self, constraint: Constraint, outcome: Grammar | str) -> None:
        digest = _digest(constraint)
        with self._lock:
            self._forget(digest)
            self._outcomes[digest] = outcome
            self._bytes += _size(outcome)
            while self._bytes > CACHE_BYTES and len(self._outcomes) > 1:
                self._forget(next(iter(self._outcomes)))

    def _forget(self, digest: bytes) -> None:
        outcome = self._outcomes.pop(digest, None)
        if outcome is not None:
            self._bytes -= _size(outcome)


def _digest(constraint: Constraint) -> bytes:
    """Return 32 bytes that identify the constraint."""
    return hashlib.sha256(f"{constraint.kind.value} {constraint.source}".encode("utf-8", "surrogatepass")).digest()


def _size(outcome: Grammar | str) -> int:
    return outcome.bytes if isinstance(outcome, Grammar) else LEAST_BYTES


def _set_bit(mask: npt.NDArray[np.int32], bit: int, value: bool) -> None:
    word, position = divmod(bit, 32)
    flag = np.uint32(1 << position).view(np.int32)
    mask[word] = mask[word] | flag if value else mask[word] & ~flag
