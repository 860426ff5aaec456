"""The inference engine of one model: requests in, tokens out, many at a time."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import secrets
import time
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Items
from typing import Protocol

import torch

from nanochat_core.engine.backends.base import Awaited
from nanochat_core.engine.backends.select import build_runner
from nanochat_core.engine.block_manager import BlockManager
from nanochat_core.engine.config import EngineConfig
from nanochat_core.engine.constraints import Grammars
from nanochat_core.engine.request import (
    NO_TOOLS,
    Completion,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    Token,
    ToolPolicy,
    ToolResult,
    Usage,
)
from nanochat_core.engine.sampler import Drawn, Sample, Sampler, sample_key
from nanochat_core.engine.scheduler import Chunk, Scheduler
from nanochat_core.engine.sequence import Sequence, State
from nanochat_core.engine.shedding import Shed, Shedding
from nanochat_core.engine.tools import ToolLoop, ToolRunner
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.tokenizer import Tokenizer


class QueueFull(Exception):
    """Too many sequences wait already; the request was not accepted and may be sent again later."""


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """What the engine is busy with: sequences by state, and blocks of the KV cache."""

    running: int
    waiting: int
    parked: int
    blocks_total: int
    blocks_used: int


class Observer(Protocol):
    """Is told what happens, for metrics. Called on the engine's thread; times are in seconds."""

    def admitted(self, queued: float, prompt_tokens: int, cached_tokens: int) -> None: ...
    def preempted(self, sequences: int) -> None: ...
    def out_of_memory(self) -> None: ...
    def first_token(self, since_arrival: float) -> None: ...
    def next_token(self, since_last: float) -> None: ...
    def tool_called(self, status: str) -> None: ...
    def finished(self, reason: str, since_arrival: float) -> None: ...
    def speculated(self, drafted: int, accepted: int) -> None: ...
    def stepped(self, duration: float, generated_tokens: int) -> None: ...


class _Flight:
    """A step that the device has been given: chunks that sample, and what they will have drawn."""

    def __init__(self, chunks: Items[Chunk], drawn: Drawn) -> None:
        self.chunks = chunks
        self.counts = [chunk.samples for chunk in chunks]
        self.drawn = drawn
        ends = itertools.accumulate(self.counts)
        self.awaited = Awaited(drawn.tokens, {chunk.seq: end - 1 for chunk, end in zip(chunks, ends, strict=True)})

    @property
    def may_be_overtaken(self) -> bool:
        """Whether the next step can be computed before the tokens are known: each sequence gets just one."""
        return all(chunk.seq.is_memoryless and not chunk.draft for chunk in self.chunks)

    def read(self) -> list[tuple[Chunk, list[Sample]]]:
        """Wait for the device; the samples of each chunk."""
        samples = iter(self.drawn.read())
        return [(chunk, list(itertools.islice(samples, n))) for chunk, n in zip(self.chunks, self.counts, strict=True)]


class Engine:
    """Schedules, runs and samples, one :meth:`step` at a time. Not thread-safe: one thread calls everything.

    Attributes:
        progressed: whether the last step computed anything; if not, every sequence waits for a tool.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        tool_runner: ToolRunner | None = None,
        tool_loop: asyncio.AbstractEventLoop | None = None,
        observer: Observer | None = None,
    ) -> None:
        """
        Args:
            model: on its device; nothing of it is changed.
            tool_runner: runs the model's Python calls; None answers them all with an error.
            tool_loop: event loop for the calls; None uses a thread of the engine's own.

        Raises:
            UserError: the KV cache is too small for one block.
        """
        self.config = config = config or EngineConfig()
        self.model_config, self._dtype = model.config, model.compute_dtype
        self._device = device = model.cos.device
        self.runner, groups = build_runner(model, config)
        self.blocks = BlockManager(groups, config.block_size, config.prefix_caching)
        self.scheduler = Scheduler(self.blocks, config.token_budget, config.max_running, config.speculation)
        self.sampler = Sampler(model.config.vocab_size, device)
        self.grammars = Grammars(tokenizer, model.config.vocab_size)
        self.tools = ToolLoop(
            tokenizer,
            tool_runner,
            timeout_seconds=config.tool_timeout_seconds,
            max_calls=config.tool_max_calls,
            max_output_tokens=config.tool_max_output_tokens,
            loop=tool_loop,
        )
        self.progressed = False
        self._overlap = device.type == "cuda" if config.overlap is None else config.overlap
        self._flight: _Flight | None = None
        self._shedding = Shedding(self.scheduler, device)
        self._observer = observer
        self._arrivals = itertools.count()
        self._requests: dict[str, list[Sequence]] = {}
        self._outputs: list[Output] = []
        self._latest: dict[Sequence, Output] = {}

    def check(self, request: Request) -> None:
        """Refuse what can never be served.

        Raises:
            UserError: says what is wrong with the request.
        """
        self.check_but_constraint(request)
        if request.sampling.constraint is not None:
            self.grammars.compile(request.sampling.constraint)

    def check_but_constraint(self, request: Request) -> None:
        """The same, but for the constraint; other threads may ask.

        Raises:
            UserError: says what is wrong with the request.
        """
        model, prompt, sampling = self.model_config, request.prompt, request.sampling
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
            for token in tokens:
                if not 0 <= token < model.vocab_size:
                    raise UserError(f"{name} has token {token}, which is outside the vocabulary of {model.vocab_size}")
        if not 1 <= request.n <= self.config.max_running:
            raise UserError(f"n is {request.n}; it must be between 1 and {self.config.max_running}")
        length = self._max_length(request)
        if not self.blocks.holds(length - 1):  # the last token is never computed
            needed, there = self.blocks.blocks_for(length - 1), self.blocks.groups[0].num_blocks
            raise UserError(
                f"prompt and completion may reach {length} tokens, which need {needed} cache blocks, but the engine "
                f"has {there}; lower max_tokens or enlarge the KV cache"
            )

    def check_room(self, sequences: int) -> None:
        """Refuse so many more sequences when the queue has no room for them now; other threads may ask.

        Raises:
            QueueFull: they may be served later.
        """
        if sequences > self._room():
            raise QueueFull(f"{len(self.scheduler.waiting)} sequences are waiting already; try again later")

    def add(self, request: Request) -> None:
        """Queue a request; its outputs come out of :meth:`step`.

        Raises:
            UserError: it can never be served.
            QueueFull: it may be served later.
        """
        self.check(request)
        if request.id in self._requests:
            raise UserError(f"request id {request.id!r} is in use; ids of requests in flight must differ")
        self.check_room(request.n)
        constraint = request.sampling.constraint
        if constraint is not None:
            request = dataclasses.replace(request, tools=NO_TOOLS)
        seed = secrets.randbits(64) if request.sampling.seed is None else request.sampling.seed
        length = self._max_length(request)
        sequences = self._requests[request.id] = [
            Sequence(request, choice, next(self._arrivals), sample_key(seed, choice), length)
            for choice in range(request.n)
        ]
        for seq in sequences:
            seq.arrived_at = time.monotonic()
            if constraint is not None:
                seq.matcher = self.grammars.matcher(constraint, request.sampling.stop_token_ids)
            self.scheduler.add(seq)
            if self.tools.scan_prompt(seq):
                self._call_tool(seq)

    def cancel(self, request_id: str) -> None:
        """Forget a request and free what it holds; unknown ids are ignored, for it may just have finished."""
        self._end(request_id, "cancelled")

    def step(self) -> list[Output]:
        """Give the device one batch and give back what is new.

        With overlap that is what the step before has drawn: it is read after the device has got its next batch, in
        which each sequence goes on with a token that only the device knows. Where that token ends the sequence or calls
        a tool, what was computed beyond it is dropped. Sequences that look back at what they have said, or that draft,
        need to know it first; then nothing overlaps.
        """
        started = time.perf_counter()
        for done in self.tools.collect():
            if done.seq.state is State.PARKED:
                self._resume(done.seq, done.result)
        preemptions = self.scheduler.preemptions
        before, self._flight = self._flight, None
        landed, generated = before is not None, 0
        if before and (self.scheduler.drafts or not before.may_be_overtaken):
            generated += self._land(before)
            before = None
        chunks = self.scheduler.schedule()
        self.progressed = bool(chunks) or landed
        self._note_admissions(chunks)
        flight, out_of_memory = self._launch(chunks, before) if chunks else (None, False)
        if before:
            generated += self._land(before)
        if out_of_memory:
            self._shed(chunks)
        else:
            self.scheduler.computed(chunks)
        if flight:
            for chunk in flight.chunks:
                chunk.seq.in_flight = chunk.seq.state is State.RUNNING
            if self._overlap:
                self._flight = flight
            else:
                generated += self._land(flight)
        if self._observer and self.progressed:
            self._observer.stepped(time.perf_counter() - started, generated)
            if self.scheduler.preemptions > preemptions:
                self._observer.preempted(self.scheduler.preemptions - preemptions)
        outputs, self._outputs = self._outputs, []
        self._latest.clear()
        return outputs

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """Answer requests in one continuous batch, and yield each request's id and choices when its last choice ends.

        The engine must not have other requests. Requests wait here while the queue is full. If the caller stops
        iterating, requests that are still in flight are canceled.

        Raises:
            UserError: a request can never be served; no request has been started then.
            Shed: the device has too little memory for a request.
        """
        waiting = collections.deque(requests)
        for request in waiting:
            self.check(request)
        running: dict[str, list[Completion]] = {}
        try:
            while waiting or running:
                while waiting and waiting[0].n <= self._room():
                    request = waiting.popleft()
                    self.add(request)
                    running[request.id] = [Completion() for _ in range(request.n)]
                for output in self.step():
                    if output.error:
                        raise output.error
                    choices = running[output.request_id]
                    choices[output.index].append(output)
                    if output.finish_reason and all(choice.finish_reason for choice in choices):
                        yield output.request_id, running.pop(output.request_id)
                if not self.progressed:
                    self.tools.wait()
        finally:
            for request_id in running:
                self.cancel(request_id)

    def generate(
        self,
        prompts: Items[Items[int]],
        sampling: SamplingParams | Items[SamplingParams],
        *,
        n: int = 1,
        tools: ToolPolicy = NO_TOOLS,
    ) -> list[list[Completion]]:
        """Continue every prompt ``n`` times with :meth:`complete`.

        Args:
            sampling: one for all prompts, or one for each.

        Returns:
            The ``n`` completions of each prompt, in the order of the prompts.

        Raises:
            UserError: a prompt can never be served.
            Shed: the device has too little memory.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        requests = [
            Request(str(i), tuple(prompt), params, n, tools)
            for i, (prompt, params) in enumerate(zip(prompts, each, strict=True))
        ]
        results = dict(self.complete(requests))
        return [results[request.id] for request in requests]

    def load(self) -> Load:
        """A snapshot; other threads may call this."""
        scheduler = self.scheduler
        used, total = self.blocks.usage
        return Load(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            parked=len(scheduler.parked),
            blocks_total=total,
            blocks_used=used,
        )

    def update_weights(self, model: GPT) -> None:
        """Go on with the weights that ``model`` has now, and forget prefixes that were computed with the old ones.

        On a CPU memory is that of one set of weights: the old ones are freed while the new ones are laid out. On a GPU
        it is that of two, because the new ones are copied to where graphs have the old ones.

        Args:
            model: of the same configuration, dtype and device as the engine's. Nothing of it is changed, and what
                becomes of it later changes nothing here.

        Raises:
            RuntimeError: requests are in flight; their keys and values are of the old weights.
            ValueError: the model is another one.
        """
        if self._requests:
            raise RuntimeError(f"{len(self._requests)} requests are in flight; weights change between requests")
        if (model.config, model.compute_dtype) != (self.model_config, self._dtype):
            raise ValueError("the new weights are of a model with another configuration or dtype")
        self._flight = None  # what was computed beyond the ends of the last requests
        self.runner.load(model)
        self.blocks.forget()

    def warm_up(self) -> None:
        """Run a large and a small step, so that the first requests meet a warm engine. Call before any request."""
        with self._on_device():
            self.runner.warm_up()
        smallest = min(group.num_blocks for group in self.blocks.groups)
        length = min(self.config.token_budget, self.model_config.context_length, smallest * self.config.block_size)
        sampling = SamplingParams(temperature=1.0, seed=0)
        seq = Sequence(Request("warm-up", (0,) * length, sampling), 0, 0, 0, length)
        seq.block_tables = [list(range(self.blocks.blocks_for(length))) for _ in self.blocks.groups]
        for chunk in (Chunk(seq, 0, length), Chunk(seq, length - 1, 1)):
            flight = self._draw([chunk])
            assert flight is not None, "both sample"
            flight.read()

    def check_integrity(self) -> None:
        """Compare the scheduler's and the block manager's books with the requests in flight.

        Raises:
            AssertionError: they disagree.
        """
        live = [seq for sequences in self._requests.values() for seq in sequences if seq.state is not State.FINISHED]
        for state, listed in self.scheduler.by_state.items():
            assert set(listed) == {seq for seq in live if seq.state is state}, f"the {state.value} list is wrong"
        self.blocks.check_integrity(live)

    def close(self) -> None:
        """Stop outstanding tool calls."""
        self.tools.close()

    def _launch(self, chunks: list[Chunk], before: _Flight | None) -> tuple[_Flight | None, bool]:
        """Give the device a batch; what samples in it, and whether there was too little memory for it.

        Args:
            before: the step that some of the chunks run ahead of.
        """
        try:
            flight = self._draw(chunks, before.awaited if before else None)
        except Exception as error:
            if not self._shedding.can_go_on(error, chunks):
                raise
            return None, True
        self._shedding.fitted()
        return flight, False

    def _land(self, flight: _Flight) -> int:
        """Read what a step has drawn and append it; how many tokens that were."""
        return sum(self._extend(chunk, samples) for chunk, samples in flight.read())

    def _shed(self, chunks: list[Chunk]) -> None:
        """Go on with less after a step that did not fit."""
        if self._observer:
            self._observer.out_of_memory()
        seq = self._shedding.shrink(chunks)
        if seq is not None and seq.state is not State.FINISHED:
            self._end(seq.request.id, "shed")
            self._output(seq).error = Shed("the device has run out of memory; send the request again later")

    def _room(self) -> int:
        """How many more sequences there may be: as many as may run, and as many as may wait.

        Out of memory, fewer may run; but without any request the engine takes what it takes at first.
        """
        if not self._requests:
            return self.config.max_waiting + self.config.max_running
        there = sum(map(len, self.scheduler.by_state.values()))
        return self.config.max_waiting + self.scheduler.max_running - there

    def _max_length(self, request: Request) -> int:
        limit, wanted = self.model_config.context_length, request.sampling.max_tokens
        return min(limit, len(request.prompt) + wanted) if wanted else limit

    def _note_admissions(self, chunks: Iterable[Chunk]) -> None:
        for chunk in chunks:
            seq = chunk.seq
            if seq.admitted_at is None:
                seq.admitted_at = time.monotonic()
                if self._observer:
                    queued = seq.admitted_at - seq.arrived_at
                    self._observer.admitted(queued, seq.prompt_length, seq.cached_prompt_tokens)

    def _draw(self, chunks: Items[Chunk], awaited: Awaited | None = None) -> _Flight | None:
        """Compute a batch and begin to draw its next tokens; None where none is sampled."""
        with self._on_device():
            sampling, logits = self.runner.run(chunks, awaited)
            rows = [(chunk.seq, chunk.start + chunk.known + i) for chunk in sampling for i in range(chunk.samples)]
            if not rows:
                return None
            return _Flight(sampling, self.sampler.draw(logits, [seq for seq, _ in rows], [place for _, place in rows]))

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """Kernels start on the current GPU of the thread, which may be another one than the model's."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _extend(self, chunk: Chunk, samples: list[Sample]) -> int:
        """Append the next token, and those after it as long as the draft was right.

        A sequence that has ended or called a tool since the step was begun has no use for them.

        Returns:
            How many tokens that were.
        """
        seq, before = chunk.seq, len(chunk.seq.tokens)
        if not seq.in_flight:
            return 0
        seq.in_flight = False
        for sample, drafted in itertools.zip_longest(samples, chunk.draft):
            self._append(seq, sample)
            if seq.state is not State.RUNNING or sample.token != drafted:
                break
            seq.computed += 1
        generated = len(seq.tokens) - before
        self._note_tokens(seq, generated)
        if self._observer and chunk.draft:
            self._observer.speculated(len(chunk.draft), generated - 1)
        return generated

    def _note_tokens(self, seq: Sequence, count: int) -> None:
        """Tell when ``count`` tokens of a step came; they share the time since those before them."""
        if not self._observer or not count:
            return
        now = time.monotonic()
        if seq.last_token_at is None:
            self._observer.first_token(now - seq.arrived_at)
        else:
            for _ in range(count):
                self._observer.next_token((now - seq.last_token_at) / count)
        seq.last_token_at = now

    def _append(self, seq: Sequence, sample: Sample) -> None:
        """Append a sampled token and see what follows from it."""
        matcher, stops = seq.matcher, seq.request.sampling.stop_token_ids
        if matcher is not None and matcher.stuck:  # nothing may follow, so the sample means nothing
            self._finish(seq, FinishReason.STOP if matcher.complete else FinishReason.LENGTH)
            return
        seq.tokens.append(sample.token)
        self._output_for_tokens(seq).tokens.append(Token(sample.token, sample.logprob, sample.top_logprobs))
        at_end = len(seq.tokens) >= seq.max_length
        if sample.token in stops:
            self._finish(seq, FinishReason.STOP)
        elif matcher is not None and matcher.advance(sample.token) and (at_end or not stops):
            self._finish(seq, FinishReason.STOP)  # no stop token says so, but the text is whole
        elif at_end:
            self._finish(seq, FinishReason.LENGTH)
        elif self.tools.observe(seq):
            self._call_tool(seq)

    def _call_tool(self, seq: Sequence) -> None:
        self.scheduler.park(seq)
        self._output(seq).tool_events.append(self.tools.start(seq))

    def _resume(self, seq: Sequence, result: ToolResult) -> None:
        """Append a tool's output and put the sequence back to work."""
        if self._observer:
            self._observer.tool_called(result.status)
        forced = self.tools.output_tokens(result)
        fits = len(seq.tokens) + len(forced) <= seq.max_length
        output = self._output_for_tokens(seq)
        output.tool_events.append(result)
        if fits:
            seq.tokens += forced
            output.tokens += [Token(token, forced=True) for token in forced]
        if fits and len(seq.tokens) < seq.max_length:
            self.scheduler.resume(seq)
        else:
            self._finish(seq, FinishReason.LENGTH)

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        output = self._output(seq)
        output.finish_reason = reason
        output.usage = Usage(seq.prompt_length, seq.completion_length, seq.cached_prompt_tokens)
        self._leave(seq, reason.value)
        if all(sibling.state is State.FINISHED for sibling in self._requests[seq.request.id]):
            del self._requests[seq.request.id]

    def _end(self, request_id: str, reason: str) -> None:
        for seq in self._requests.pop(request_id, []):
            if seq.state is not State.FINISHED:
                self._leave(seq, reason)

    def _leave(self, seq: Sequence, reason: str) -> None:
        self.tools.cancel(seq)
        self.scheduler.finish(seq)
        seq.in_flight = False
        if self._observer:
            self._observer.finished(reason, time.monotonic() - seq.arrived_at)

    def _output(self, seq: Sequence) -> Output:
        """This step's latest output of ``seq``."""
        return self._latest.get(seq) or self._new_output(seq)

    def _output_for_tokens(self, seq: Sequence) -> Output:
        """The same, unless it has tool events already: those come after their output's tokens."""
        output = self._output(seq)
        return self._new_output(seq) if output.tool_events else output

    def _new_output(self, seq: Sequence) -> Output:
        output = self._latest[seq] = Output(seq.request.id, seq.choice)
        self._outputs.append(output)
        return output
