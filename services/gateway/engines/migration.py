"""Streams that survive a failure of their engine. Another engine continues the answer; no token is lost or repeated."""

import asyncio
import enum
import logging
import math
import random
import time

import grpc

from nanochat_core.protos import engine_pb2
from services.gateway.engines.model import ServedModel
from services.gateway.engines.pool import EnginePool, Wish
from services.gateway.engines.replica import Call, Place, Replica
from services.gateway.engines.request import PromptEncoder, engine_request
from services.gateway.engines.said import Said, continuations
from services.gateway.errors import ApiError, from_rpc, is_caller_limit, no_engine
from services.gateway.schemas import Body

logger = logging.getLogger(__name__)

# In the queue, a stream that has begun goes before all new requests, because its client already sees a part of the
# answer.
_PRIORITY_OF_STREAMS = -1
# After this many failures of engines, a stream looks for no other engine, even if tokens arrive in between: the request
# itself may kill engines. An engine that refuses the call, because it is full or has another model, has not failed.
_MOST_FAILURES = 16
# Two failures without a chunk in between cause a pause of this length before the next attempt. Each further failure
# doubles the pause. A random factor shortens the pause by up to half.
_PAUSE_SECONDS = 0.1


class Reason(enum.StrEnum):
    """Why a request needs another engine. The values are labels of the metrics."""

    DIED = "died"  # the call ended with an error
    HUNG = "hung"  # the engine sends no chunks and does not answer health checks
    DRAINS = "drains"  # the engine is shutting down
    FULL = "full"  # the engine had no room for the request, or ran out of memory
    OTHER_MODEL = "other_model"  # the engine has just changed its model


class Stream:
    """The answer to one prompt, as one sequence of chunks. The chunks may come from several engines.

    At any time the stream has a call that delivers the chunks, or a search for a place (reserved room at an engine), or
    both. When the call's engine drains or hangs, a search begins while the call goes on. Once the search has found a
    place, a second call begins there: the successor. The successor's request contains the answer so far. From then on
    the stream reads nothing from the old call, so the client gets nothing twice. The successor's first chunk ends the
    old call. If the successor fails instead, the stream reads from the old call again.

    Attributes:
        model: the model that answers. It no longer changes once :meth:`start` has returned.
    """

    model: ServedModel

    def __init__(
        self,
        pool: EnginePool,
        body: Body,
        encode: PromptEncoder,
        *,
        caller: str,
        request_id: str,
        seed: int,
        sandbox: bool,
    ) -> None:
        """``caller`` identifies the client. Waiting requests of different clients take turns, and so do Python calls.

        ``sandbox`` says whether the model may run Python in a chat.

        Call :meth:`close` when the stream is no longer needed.
        """
        self._pool = pool
        self._body = body
        self._encode = encode
        self._request_id = request_id
        self._seed = seed
        self._sandbox = sandbox
        self._wish = Wish(body.model, body.n or 1)
        self._ticket = pool.ticket(self._wish, caller=caller, priority=body.priority or 0)
        self._encoded_for: ServedModel | None = None
        self._request = engine_pb2.GenerateRequest()
        self._said = [Said() for _ in range(self._wish.sequences)]
        self._first: engine_pb2.GenerateChunk | None = None  # the first chunk, kept until :meth:`read` returns it
        self._begun = False  # whether any chunk has arrived
        self._last_chunk = 0.0
        self._deadline: float | None = None  # latest time for the end of the answer; set by the first call
        self._patience: float | None = None  # end of the wait for an engine; None while chunks arrive
        self._call: Call | None = None
        self._successor: Call | None = None
        self._search: asyncio.Task[Place] | None = None
        self._reason: Reason | None = None  # why the stream leaves its call, or why the last call ended
        self._failure: ApiError | None = None  # the failure of the last call
        self._failures = 0
        self._fruitless = 0  # failures since the last chunk
        self._refreshed: set[Replica] = set()  # replicas whose model was read again after they had refused the request
        self._wake = asyncio.Event()

    @property
    def prompt_tokens(self) -> int:
        """Number of tokens of the prompt."""
        return len(self._wish.prompt)

    @property
    def placed_at(self) -> float | None:
        """Time at which an engine got the request, on the clock of ``time.monotonic``; None while the request waits."""
        call = self._call or self._successor
        return call.began if call is not None else None

    async def start(self) -> None:
        """Sends the request to an engine, and waits for the first chunk of the answer.

        Raises:
            ApiError: the request doesn't fit the model, or no replica could begin the answer.
        """
        self._pool.retries.earn()
        model = self._pool.model(self._wish.name)
        if model is not None:
            await self._encode_for(model)
        self._look(None)
        self._first = await self.read()
        self._pool.metrics.prompt_tokens.inc(self.prompt_tokens)

    async def read(self) -> engine_pb2.GenerateChunk | None:
        """Returns the next chunk of the answer, or None after the last chunk.

        Raises:
            ApiError: the answer can't go on.
        """
        if self._first is not None:
            chunk, self._first = self._first, None
            return chunk
        try:
            return await self._next_chunk()
        except ApiError as error:
            # An answer that reaches the time limit is not lost: its engine works, and no other engine may continue it.
            if self._begun and error.code != "timeout":
                self._pool.metrics.streams_lost.inc()
            raise

    def finish(self, index: int) -> None:
        """Records that the client needs nothing more of the choice ``index``."""
        self._said[index].finished = True

    def close(self) -> None:
        """Cancels the stream's calls to engines and its search for another engine."""
        self._stop_search()
        for call in (self._successor, self._call):
            if call is not None:
                call.close()

    async def _next_chunk(self) -> engine_pb2.GenerateChunk | None:
        while not all(said.finished for said in self._said):
            self._wake.clear()
            call = self._successor or self._call
            if self._search is not None and self._search.done():
                await self._begin_successor()
            elif call is None:
                await self._wake.wait()
            elif (chunk := call.take()) is not None:
                if not chunk.draining:
                    self._accept(call, chunk)
                    return chunk
                call.place.replica.mark_down("it is shutting down")
                self._leave(call, Reason.DRAINS)
            elif call.failure is not None:
                self._failed(call, call.failure)
            elif call.silent and (call is self._successor or self._reason is None):
                self._leave(call, Reason.HUNG)
            else:
                await self._wake.wait()
        return None

    def _accept(self, call: Call, chunk: engine_pb2.GenerateChunk) -> None:
        """Records a chunk that the client will get. With its first chunk, a successor becomes the stream's call."""
        now = time.monotonic()
        if call is self._successor:
            self._promote(call, now)
        elif self._reason is Reason.HUNG:  # the chunk shows that the engine was slow but did not hang
            self._stop_search()
            self._reason = None
        if not self._begun:
            self._begun = True
            self._pool.began(self._ticket)
            self._wish.weights = self.model.weights
            self._ticket.priority, self._ticket.bounded = _PRIORITY_OF_STREAMS, False
        self._last_chunk, self._patience, self._fruitless = now, None, 0
        self._said[chunk.index].add(chunk)
        if chunk.HasField("usage"):
            # The router needs the number of the prompt's cached tokens. The engine's count may include cached tokens of
            # an answer that moved to this engine, so the count is limited to the length of the prompt.
            cached = min(chunk.usage.cached_prompt_tokens, self.prompt_tokens)
            self._pool.answered(call.place, self._wish, cached)

    def _promote(self, successor: Call, now: float) -> None:
        replica, metrics, reason = successor.place.replica, self._pool.metrics, self._reason
        replica.outlier.succeeded()
        if not self._begun:
            self._pool.outcome(successor.place.model, now - successor.began)
        if reason is not None and self._begun:
            metrics.migrations.labels(reason).inc()
            metrics.migration_gap_seconds.labels(reason).observe(now - self._last_chunk)
            facts = {"request_id": self._request_id, "reason": reason, "address": replica.address}
            logger.info("stream moved", extra=facts)
        elif reason is not None:
            metrics.failovers.inc()
        if self._call is not None:
            self._call.close()
        self._call, self._successor, self._reason = successor, None, None
        self._wish.avoid.clear()

    def _leave(self, call: Call, reason: Reason) -> None:
        """Begins to look for another engine, because the call's engine drains or hangs.

        The stream's call goes on meanwhile. A successor's call ends.

        Raises:
            ApiError: the stream has no running call and no attempts left.
        """
        if reason is Reason.HUNG:
            self._pool.outcome(call.place.model, math.inf)
            self._wish.canary = False
        if call is self._call:
            self._reason = reason
            free = reason is Reason.DRAINS
        else:
            call.close()
            self._successor, self._reason = None, self._reason or reason
            free = False
        if free or self._may_fail_again():
            self._look(self._reason)
        elif self._call is None:
            raise self._failure or no_engine()

    def _failed(self, call: Call, error: grpc.aio.AioRpcError) -> None:
        """Handles the failure of a call whose chunks have all been read: looks for another engine if that can help.

        Raises:
            ApiError: the answer can't go on: another engine can't help, or the stream has no attempts left.
        """
        code, replica = error.code(), call.place.replica
        constraint = self._body.constraint
        parameter = constraint.parameter if constraint is not None else None
        self._failure = from_rpc(error, started=self._begun, constraint=parameter)
        final = code is grpc.StatusCode.INVALID_ARGUMENT or is_caller_limit(error)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED or (final and not self._begun):
            raise self._failure
        refused = code is grpc.StatusCode.RESOURCE_EXHAUSTED
        facts = {"request_id": self._request_id, "address": replica.address, "code": code.name}
        level = logging.DEBUG if refused else logging.WARNING
        logger.log(level, "engine call failed", extra=facts | {"details": error.details()})
        reason, may_go_on, stale = Reason.DIED, True, None
        if refused:
            # An engine that refuses a call after its first chunk is out of memory. Other engines may have as little
            # memory, so the number of such attempts is limited.
            reason, may_go_on = Reason.FULL, call.last_chunk is None or self._may_fail_again()
        elif code is grpc.StatusCode.FAILED_PRECONDITION:
            reason = Reason.OTHER_MODEL
            if replica in self._refreshed:
                self._wish.avoid.add(replica.address)
            else:
                self._refreshed.add(replica)
                stale = replica
        else:
            may_go_on = self._blame(call.place, code)
        call.close(refused=refused)
        if call is self._successor:
            self._successor = None
            reason = self._reason or reason
        else:
            self._call = None
        if self._call is None and not (may_go_on and self._pool.promising(self._wish)):
            raise self._failure
        if may_go_on:
            self._look(reason, stale)

    def _blame(self, place: Place, code: grpc.StatusCode) -> bool:
        """Records a failure that is the engine's fault, and returns whether the stream may have another attempt.

        The code CANCELLED is not the engine's fault, because the engine is shutting down.
        """
        replica = place.replica
        if code is grpc.StatusCode.CANCELLED:
            return self._may_fail_again()
        self._pool.outcome(place.model, math.inf)
        self._wish.canary = False
        unavailable = code is grpc.StatusCode.UNAVAILABLE
        # When an engine dies, many calls fail together with UNAVAILABLE. Only the first of these failures counts: it
        # marks the engine down, and the later failures find the engine down already.
        counts = replica.up or not unavailable
        if counts and replica.outlier.failed(place, time.monotonic()):
            self._pool.metrics.ejections.inc()
            logger.warning("engine ejected", extra={"address": replica.address, "code": code.name})
        if unavailable:
            replica.mark_down(f"a call ended with {code.name}")
        else:
            self._wish.avoid.add(replica.address)
        return self._may_fail_again(fault=not unavailable)

    def _may_fail_again(self, *, fault: bool = False) -> bool:
        """Counts a failure and returns whether the stream may have another attempt.

        ``fault`` says that the engine still accepts calls but fails them. Repeated attempts of many streams could
        overload such an engine. Therefore all attempts except the first one after a chunk use up the budget for
        retries. Other failures need no budget: an engine that died or hangs gets no calls until it answers a health
        check.
        """
        self._failures += 1
        self._fruitless += 1
        if self._fruitless >= self._pool.settings.max_failures or self._failures >= _MOST_FAILURES:
            return False
        return not fault or self._fruitless == 1 or self._pool.retries.spend()

    def _look(self, reason: Reason | None, stale: Replica | None = None) -> None:
        """Begins a search for a place (reserved room at an engine). First reads the model of ``stale`` again, if given.

        ``reason`` says why the stream leaves its call, or why its last call ended.
        """
        self._stop_search()
        self._reason = reason
        self._search = asyncio.create_task(self._find_place(stale))
        self._search.add_done_callback(lambda _: self._wake.set())

    async def _find_place(self, stale: Replica | None) -> Place:
        if stale is not None and not stale.leaving:  # a leaving engine is not asked: its connection may be closed
            await stale.refresh_model()
        if self._fruitless > 1:
            await asyncio.sleep(_PAUSE_SECONDS * 2.0 ** (self._fruitless - 2) * random.uniform(0.5, 1))  # noqa: S311
        if self._call is not None:  # the search has no time limit, because the old call may still finish the answer
            return await self._pool.place(self._wish, self._ticket, None)
        now = time.monotonic()
        if self._patience is None:
            self._patience = now + self._pool.settings.queue_seconds
        return await self._pool.place(self._wish, self._ticket, max(self._patience - now, 0.0))

    def _stop_search(self) -> None:
        search, self._search = self._search, None
        if search is not None and not search.cancel() and search.exception() is None:
            search.result().give_back()

    async def _begin_successor(self) -> None:
        """Begins a call to the engine at which the search has reserved room."""
        assert self._search is not None
        search, self._search = self._search, None
        try:
            place = search.result()
        except ApiError as error:
            if self._call is not None:
                return
            raise (self._failure if self._begun and self._failure else error) from None
        try:
            now = time.monotonic()
            if not self._begun:
                await self._encode_for(place.model)
                self._request = engine_request(
                    self._body,
                    place.model,
                    self._wish.prompt.ids,
                    self._pool.settings,
                    request_id=self._request_id,
                    caller=self._ticket.caller,
                    seed=self._seed,
                    sandbox=self._sandbox,
                )
            if self._deadline is None:
                self._deadline = now + self._pool.settings.request_timeout_seconds
            del self._request.continued[:]
            self._request.continued.extend(continuations(self._said))
            seconds = max(self._deadline - now, 0.0)
            self._successor = Call(place, self._request, seconds=seconds, wake=self._wake.set)
        except BaseException:
            place.give_back()
            raise

    async def _encode_for(self, model: ServedModel) -> None:
        """Encodes the prompt for the model, unless it is already encoded for an equal tokenizer and context length."""
        known, self.model, self._encoded_for = self._encoded_for, model, model
        if known is None or known.tokenizer is not model.tokenizer or known.context_length != model.context_length:
            self._wish.prompt = self._pool.prompt(await self._encode(model))
