"""Decides which requests the engine accepts, and creates their sequences."""

import dataclasses
import itertools
import secrets
import time
from collections.abc import Iterable

from nanochat_core.config import ModelConfig
from nanochat_core.engine.config import EngineConfig
from nanochat_core.engine.constraints import Grammar, Grammars
from nanochat_core.engine.request import NO_TOOLS, Request
from nanochat_core.engine.sampler import sample_key
from nanochat_core.engine.scheduler import Scheduler
from nanochat_core.engine.sequence import Sequence
from nanochat_core.errors import UserError


class QueueFull(Exception):
    """The request was not accepted; the caller may send it again later.

    Either too many sequences are waiting, or the request's constraint could not be compiled in time.
    """


class Admission:
    """Checks requests against the model, the KV cache and the queue."""

    def __init__(self, model: ModelConfig, config: EngineConfig, scheduler: Scheduler, grammars: Grammars) -> None:
        self._model, self._config = model, config
        self._scheduler, self._blocks = scheduler, scheduler.blocks
        self._grammars = grammars
        self._arrivals = itertools.count()

    def check(self, request: Request) -> Grammar | None:
        """Check a request. Returns its compiled constraint, or None if the request has no constraint.

        Raises a :class:`UserError` if the request can never be served.
        """
        self.check_without_constraint(request)
        constraint = request.sampling.constraint
        return None if constraint is None else self._grammars.compile(constraint)

    def check_without_constraint(self, request: Request) -> None:
        """Check a request except its constraint, whose compilation may take long. Any thread may call this.

        An invalid request raises a :class:`UserError` that says why.
        """
        model, prompt, sampling = self._model, request.prompt, request.sampling
        if not prompt:
            raise UserError("the prompt is empty; it needs at least one token")
        if len(prompt) >= model.context_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, but the context length is {model.context_length} "
                "and at least one token must fit after the prompt"
            )
        for name, tokens in (
            ("the prompt", prompt),
            ("stop_token_ids", sampling.stop_token_ids),
            ("logit_bias", sampling.logit_bias),
        ):
            self._check_tokens(name, tokens)
        if sampling.prompt_logprobs is not None and request.tools.enabled and sampling.constraint is None:
            raise UserError("prompt_logprobs is only possible without tools")
        if not 1 <= request.n <= self._config.max_running:
            raise UserError(f"n is {request.n}; it must be between 1 and {self._config.max_running}")
        length = self._max_length(request)
        if not self._blocks.holds(length - 1):  # the last token is never computed, because nothing follows it
            needed, available = self._blocks.blocks_for(length - 1), self._blocks.groups[0].num_blocks
            raise UserError(
                f"prompt and completion may reach {length} tokens, which need {needed} cache blocks, but the engine "
                f"has {available}; lower max_tokens or enlarge the KV cache"
            )
        self._check_continued(request)

    def check_room(self, sequences: int) -> None:
        """Raise :class:`QueueFull` if the queue has no room for this number of sequences. Any thread may call this."""
        if sequences > self.room():
            raise QueueFull(f"{len(self._scheduler.waiting)} sequences are waiting already; try again later")

    def room(self) -> int:
        """Number of further sequences that the engine accepts now.

        The limit is the number of sequences that may run plus the number that may wait. After the device has run out of
        memory, fewer sequences than configured may run. An idle engine always uses the configured number, so that it
        can serve a request with many choices.
        """
        present = sum(map(len, self._scheduler.by_state.values()))
        may_run = self._scheduler.max_running if present else self._config.max_running
        return self._config.max_waiting + may_run - present

    def sequences_of(self, request: Request, grammar: Grammar | None) -> list[Sequence]:
        """Create one sequence for each unfinished choice of an accepted request. Each sequence has the prompt's tokens.

        ``grammar`` is the compiled constraint of the request, if it has one.
        """
        sampling = request.sampling
        if grammar is not None:
            request = dataclasses.replace(request, tools=NO_TOOLS)
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        sequences = []
        for choice in sorted(set(range(request.n)) - request.finished):
            key, length = sample_key(seed, choice), self._max_length(request)
            seq = Sequence(request, choice, next(self._arrivals), key, length)
            seq.arrived_at = time.monotonic()
            if grammar is not None:
                seq.matcher = self._grammars.matcher(grammar, sampling.stop_token_ids)
            sequences.append(seq)
        return sequences

    def _check_tokens(self, name: str, tokens: Iterable[int]) -> None:
        vocab_size = self._model.vocab_size
        for token in tokens:
            if not 0 <= token < vocab_size:
                raise UserError(f"{name} has token {token}, which is outside the vocabulary of {vocab_size}")

    def _check_continued(self, request: Request) -> None:
        """Check the indices, the token ids and the lengths of the choices that another engine began.

        ``continuation.replay`` later checks whether an engine can have produced their tokens and events.
        """
        most = self._max_length(request) - len(request.prompt)
        seen = set[int]()
        for said in request.continued:
            if not 0 <= said.index < request.n:
                raise UserError(f"continued has a choice {said.index}, but n is {request.n}")
            if said.index in seen:
                raise UserError(f"continued has choice {said.index} more than once")
            seen.add(said.index)
            if said.finished:
                continue
            self._check_tokens(f"continued choice {said.index}", (token.id for token in said.tokens))
            if len(said.tokens) > most:
                raise UserError(
                    f"continued choice {said.index} has {len(said.tokens)} tokens; max_tokens and the context length "
                    f"allow {most} after the prompt"
                )

    def _max_length(self, request: Request) -> int:
        limit, wanted = self._model.context_length, request.sampling.max_tokens
        return min(limit, len(request.prompt) + wanted) if wanted else limit
