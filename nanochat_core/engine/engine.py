"""The inference engine of one model: requests go in, tokens come out, many sequences at a time."""

import asyncio
import collections
import contextlib
import itertools
import time
from collections.abc import Generator, Iterable, Iterator
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from nanochat_core.engine.admission import Admission
from nanochat_core.engine.backends.runner import build_runner
from nanochat_core.engine.block_manager import BlockManager
from nanochat_core.engine.config import EngineConfig
from nanochat_core.engine.constraints import Grammar, Grammars
from nanochat_core.engine.continuation import replay
from nanochat_core.engine.observer import Load, Observer, note_admissions, note_tokens
from nanochat_core.engine.outputs import StepOutputs, finish_reason
from nanochat_core.engine.request import (
    NO_TOOLS,
    Completion,
    Continuation,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    Token,
    ToolCall,
    ToolPolicy,
    ToolResult,
)
from nanochat_core.engine.sampler import Sampler
from nanochat_core.engine.scheduler import Chunk, Scheduler
from nanochat_core.engine.sequence import Sequence, State
from nanochat_core.engine.shedding import Shed, Shedding
from nanochat_core.engine.step import LaunchedStep
from nanochat_core.engine.tools import ToolLoop, ToolRunner
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.tokenizer import Tokenizer


class Engine:
    """Schedules, computes and samples tokens, one :meth:`step` at a time.

    The engine is not thread-safe: one thread must call all methods, except those whose docstring allows any thread.
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
        """Build the engine of ``model`` on the model's device; the model is not changed.

        ``tool_runner`` runs the model's Python calls on ``tool_loop``. Without a runner, the model reads an error
        instead of each call's output. Without a loop, the engine starts a thread with an event loop at the first call.
        A :class:`UserError` is raised if the memory for the KV cache is too small (see
        :func:`~nanochat_core.engine.cache_groups.plan_groups`), or if there are no kernels for the quantization.
        """
        self.config = config = config or EngineConfig()
        self.model_config, self._dtype = model.config, model.compute_dtype
        self._device = device = model.cos.device
        self.runner, groups = build_runner(model, config)
        self.blocks = BlockManager(groups, config.block_size, config.prefix_caching)
        self.scheduler = Scheduler(
            self.blocks, config.token_budget, config.max_running, config.speculative_tokens, config.speculative_batch
        )
        self.sampler = Sampler(model.config.vocab_size, device)
        self.grammars = Grammars(tokenizer, model.config.vocab_size)
        self.admission = Admission(model.config, config, self.scheduler, self.grammars)
        self.tools = ToolLoop(tokenizer, tool_runner, config, tool_loop)
        # Whether the last step computed anything. If not, nothing can run before a tool's result or a request arrives.
        self.progressed = False
        self._outputs = StepOutputs()
        self._observer = observer or Observer()
        self._overlap = device.type == "cuda" if config.overlap is None else config.overlap
        self._launched: LaunchedStep | None = None
        self._shedding = Shedding(self.scheduler, device)
        self._requests: dict[str, list[Sequence]] = {}

    def add(self, request: Request, grammar: Grammar | None = None) -> None:
        """Queue a request. Its outputs are returned by :meth:`step`.

        ``grammar`` is the compiled constraint of the request. Without it, this method compiles the constraint, and
        nothing limits the time and the memory of the compilation. A service therefore compiles the constraints of its
        clients beforehand.

        Raises:
            UserError: the request can never be served, or a request with the same id is in flight.
            QueueFull: the queue is full; the caller may try again later.
        """
        if grammar is None:
            grammar = self.admission.check(request)
        else:
            self.admission.check_without_constraint(request)
        if request.id in self._requests:
            raise UserError(f"request id {request.id!r} is in use; ids of requests in flight must differ")
        self.admission.check_room(request.unfinished)
        sequences = self.admission.sequences_of(request, grammar)
        said = {choice.index: choice for choice in request.continued}
        ends = [replay(seq, said.get(seq.choice, Continuation(seq.choice)), self.tools) for seq in sequences]
        if sequences:
            self._requests[request.id] = sequences
        for seq, end in zip(sequences, ends, strict=True):
            self.scheduler.add(seq)
            if end.unsaid:
                self._outputs.for_tokens(seq).tokens += end.unsaid
            if end.finish_reason:
                self._finish(seq, end.finish_reason)
            elif end.call:
                self._call_tool(seq, end.call, reported=end.call_reported)

    def cancel(self, request_id: str) -> None:
        """Drop a request and free its blocks. An unknown id is ignored, because the request may just have finished."""
        self._end(request_id, "cancelled")

    def step(self) -> list[Output]:
        """Let the device compute one batch, and return the new outputs.

        Without overlap, the outputs contain the tokens of this batch. With overlap (:attr:`EngineConfig.overlap`), the
        outputs contain the tokens of the previous batch: the host reads these tokens only after it has sent this batch
        to the device. Each sequence then continues with a token that only the device knows. If that token ends the
        sequence or calls a tool, the token computed after it is dropped. The host reads the previous batch's tokens
        first if a sequence of that batch has penalties, a constraint or a draft, or if drafts are worthwhile now,
        because the host then needs these tokens to prepare the next batch.
        """
        started, preemptions, generated = time.perf_counter(), self.scheduler.preemptions, 0
        for seq, result in self.tools.collect():
            if seq.state is State.PARKED:
                self._resume(seq, result)
        previous, self._launched = self._launched, None
        self.progressed = previous is not None
        if previous and (self.scheduler.drafts or not previous.can_be_overtaken):
            generated += self._append_tokens(previous)
            previous = None

        chunks = self.scheduler.schedule()
        note_admissions(self._observer, chunks)
        step, out_of_memory = self._launch(chunks, previous) if chunks else (None, False)
        if previous:
            generated += self._append_tokens(previous)
        if out_of_memory:
            self._shed(chunks)
        else:
            self.scheduler.computed(chunks)
        if step:
            for chunk in step.chunks:
                chunk.seq.in_flight = chunk.seq.state is State.RUNNING
            if self._overlap:
                self._launched = step
            else:
                generated += self._append_tokens(step)

        self.progressed = self.progressed or bool(chunks)
        if self.progressed:
            self._observer.stepped(time.perf_counter() - started, generated)
            if self.scheduler.preemptions > preemptions:
                self._observer.preempted(self.scheduler.preemptions - preemptions)
        return self._outputs.take()

    def stream(self, requests: Iterable[Request]) -> Generator[Output]:
        """Answer requests with continuous batching, and yield their outputs immediately, until all choices have ended.

        The engine must not have other requests. While the queue is full, requests wait in this method. If the caller
        stops iterating, requests that are still in flight are canceled.

        Raises:
            UserError: a request can never be served. This is checked before any request starts, with two exceptions,
                for which the error is raised when the request starts: no engine can have produced the tokens and events
                in ``Request.continued``, or the id of the request is in use.
            Shed: the device has too little memory for a request.
        """
        waiting = collections.deque(requests)
        for request in waiting:
            self.admission.check(request)
        unfinished: collections.Counter[str] = collections.Counter()  # number of running choices by request id
        try:
            while waiting or unfinished:
                while waiting and waiting[0].unfinished <= self.admission.room():
                    request = waiting.popleft()
                    self.add(request)
                    unfinished += collections.Counter({request.id: request.unfinished})
                for output in self.step():
                    if output.error:
                        raise output.error
                    if output.finish_reason:
                        unfinished -= collections.Counter([output.request_id])
                    yield output
                if not self.progressed:
                    self.tools.wait()
        finally:
            for request_id in unfinished:
                self.cancel(request_id)

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[str, list[Completion]]]:
        """Like :meth:`stream`, but yield a request's id and all its choices when the last of these choices ends.

        Nothing is yielded for a request that has no unfinished choice.
        """
        started = list(requests)
        unfinished = {request.id: request.unfinished for request in started}
        choices_of = {request.id: [Completion() for _ in range(request.n)] for request in started}
        with contextlib.closing(self.stream(started)) as outputs:
            for output in outputs:
                choices = choices_of[output.request_id]
                choices[output.index].append(output)
                unfinished[output.request_id] -= output.finish_reason is not None
                if not unfinished[output.request_id]:
                    yield output.request_id, choices_of.pop(output.request_id)

    def generate(
        self,
        prompts: Items[Items[int]],
        sampling: SamplingParams | Items[SamplingParams],
        *,
        n: int = 1,
        tools: ToolPolicy = NO_TOOLS,
    ) -> list[list[Completion]]:
        """Continue every prompt ``n`` times with :meth:`complete`; returns the completions in the order of the prompts.

        ``sampling`` is one object for all prompts, or a list with one object for each prompt.
        """
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else sampling
        requests = [
            Request(str(i), tuple(prompt), params, n, tools)
            for i, (prompt, params) in enumerate(zip(prompts, each, strict=True))
        ]
        results = dict(self.complete(requests))
        return [results[request.id] for request in requests]

    def load(self) -> Load:
        """The current load. Any thread may call this."""
        scheduler = self.scheduler
        used, total = self.blocks.usage
        states = len(scheduler.running), len(scheduler.waiting), len(scheduler.parked)
        return Load(*states, total, used, scheduler.waiting_tokens)

    def update_weights(self, model: GPT) -> None:
        """Replace the weights by the weights of ``model``, and forget prefixes computed with the old weights.

        With the engine's kernels for GPUs, old and new weights are both in memory for a moment, because the new weights
        are copied to the addresses that CUDA graphs read. Otherwise, the layers' old weights are freed before memory
        for the new weights is allocated. ``model`` must be on the engine's device.

        Raises:
            RuntimeError: requests are in flight; their keys and values were computed with the old weights.
            ValueError: the model has another configuration or dtype.
        """
        if self._requests:
            raise RuntimeError(f"{len(self._requests)} requests are in flight; weights change between requests")
        if (model.config, model.compute_dtype) != (self.model_config, self._dtype):
            raise ValueError("the new weights belong to a model with another configuration or dtype")
        self._launched = None  # the requests of the launched step have ended, so its tokens are not needed
        self.runner.load(model)
        self.blocks.forget()

    def warm_up(self) -> None:
        """Run a large and a small step before the first request, so that the first request is as fast as later ones."""
        with self._on_device():
            self.runner.warm_up()
        smallest = min(group.num_blocks for group in self.blocks.groups)
        length = min(self.config.token_budget, self.model_config.context_length, smallest * self.config.block_size)
        sampling = SamplingParams(temperature=1.0, seed=0)
        seq = Sequence(Request("warm-up", (0,) * length, sampling), 0, 0, 0, length)
        seq.block_tables = [list(range(self.blocks.blocks_for(length))) for _ in self.blocks.groups]
        for chunk in (Chunk(seq, 0, length), Chunk(seq, length - 1, 1)):
            step = self._run_and_sample([chunk])
            assert step is not None, "both chunks sample"
            step.read()

    def check_integrity(self) -> None:
        """Assert that the scheduler's and the block manager's records agree with the requests in flight."""
        live = [seq for sequences in self._requests.values() for seq in sequences if seq.state is not State.FINISHED]
        for state, listed in self.scheduler.by_state.items():
            assert set(listed) == {seq for seq in live if seq.state is state}, f"the {state.value} list is wrong"
        self.blocks.check_integrity(live)

    def close(self) -> None:
        """Cancel outstanding tool calls, and stop the thread that ran them if the engine started it."""
        self.tools.close()

    def _launch(self, chunks: list[Chunk], previous: LaunchedStep | None) -> tuple[LaunchedStep | None, bool]:
        """Start a batch on the device. Returns the step, and whether memory ran out.

        The step is None if no token is sampled or memory ran out.

        ``previous`` is the previous step if its tokens have not been read yet.
        """
        try:
            step = self._run_and_sample(chunks, previous)
        except Exception as error:
            if not self._shedding.can_go_on(error, chunks):
                raise
            return None, True
        self._shedding.fitted()
        return step, False

    def _run_and_sample(self, chunks: Items[Chunk], previous: LaunchedStep | None = None) -> LaunchedStep | None:
        with self._on_device():
            computed, logits = self.runner.run(chunks, previous)
            if any(chunk.scores for chunk in computed):
                logits = self._score_prompts(computed, logits)
            sampling = [chunk for chunk in computed if chunk.samples]
            rows = [(chunk.seq, chunk.start + chunk.known + i) for chunk in sampling for i in range(chunk.samples)]
            if not rows:
                return None
            drawn = self.sampler.draw(logits, [seq for seq, _ in rows], [position for _, position in rows])
            return LaunchedStep(sampling, drawn)

    def _score_prompts(self, chunks: Items[Chunk], logits: Tensor) -> Tensor:
        """Record the log probabilities of prompt tokens. Returns the rows of ``logits`` for the tokens to sample.

        ``logits`` (rows, vocab_size) fp32 has ``chunk.logits`` rows for each chunk. The host waits for the device.
        """
        sampled, end = list[int](), 0
        for chunk in chunks:
            start, end = end, end + chunk.logits
            sampled += range(end - chunk.samples, end)
            if chunk.scores:
                seq, scores = chunk.seq, chunk.scores
                tokens, alternatives = seq.tokens[scores.start : scores.stop], seq.request.sampling.prompt_logprobs or 0
                seq.add_scores(self.sampler.score(logits[start : start + len(scores)], tokens, alternatives))
        return self.sampler.take(logits, sampled)

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        """A context in which the model's GPU is the thread's current GPU, because kernels start on that GPU."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()

    def _append_tokens(self, step: LaunchedStep) -> int:
        """Wait for a step's tokens and append them; returns the number of appended tokens."""
        return sum(self._extend(chunk, samples) for chunk, samples in step.read())

    def _extend(self, chunk: Chunk, samples: list[Token]) -> int:
        """Append a chunk's samples up to and including the first sample that differs from the draft.

        A sample that ends the sequence or calls a tool is also the last appended one. If the sequence has already ended
        or called a tool since the step was launched, all its samples are dropped. Returns the number of appended
        tokens.
        """
        seq, before = chunk.seq, len(chunk.seq.tokens)
        if not seq.in_flight:
            return 0
        seq.in_flight = False
        for sample, drafted in itertools.zip_longest(samples, chunk.draft):
            self._append(seq, sample)
            if seq.state is not State.RUNNING or sample.id != drafted:
                break
            seq.computed += 1
        generated = len(seq.tokens) - before
        if generated:
            note_tokens(self._observer, chunk, generated)
        return generated

    def _append(self, seq: Sequence, sample: Token) -> None:
        if seq.matcher is not None and seq.matcher.stuck:  # the constraint allows no token, so the sample is ignored
            self._finish(seq, FinishReason.STOP if seq.matcher.complete else FinishReason.LENGTH)
            return
        seq.tokens.append(sample.id)
        self._outputs.for_tokens(seq).tokens.append(sample)
        if reason := finish_reason(seq):
            self._finish(seq, reason)
        elif call := self.tools.observe(seq):
            self._call_tool(seq, call)

    def _call_tool(self, seq: Sequence, call: ToolCall, *, reported: bool = False) -> None:
        self.scheduler.park(seq)
        self.tools.start(seq, call)
        if not reported:
            self._outputs.of(seq).tool_events.append(call)

    def _resume(self, seq: Sequence, result: ToolResult) -> None:
        self._observer.tool_called(result.status)
        forced = self.tools.append_output(seq, result)
        self._outputs.add_result(seq, result, forced)
        if forced and len(seq.tokens) < seq.max_length:
            self.scheduler.resume(seq)
        else:
            self._finish(seq, FinishReason.LENGTH)

    def _finish(self, seq: Sequence, reason: FinishReason) -> None:
        self._outputs.finish(seq, reason)
        self._leave(seq, reason.value)
        if all(sibling.state is State.FINISHED for sibling in self._requests[seq.request.id]):
            del self._requests[seq.request.id]

    def _shed(self, chunks: list[Chunk]) -> None:
        """Continue with a smaller batch, or with fewer requests, after a step did not fit into memory."""
        self._observer.out_of_memory()
        seq = self._shedding.shrink(chunks)
        if seq is not None and seq.state is not State.FINISHED:
            self._end(seq.request.id, "shed")
            error = Shed("the device has run out of memory; send the request again later")
            self._outputs.of(seq).error = error  # ends the whole request

    def _end(self, request_id: str, reason: str) -> None:
        for seq in self._requests.pop(request_id, []):
            if seq.state is not State.FINISHED:
                self._leave(seq, reason)

    def _leave(self, seq: Sequence, reason: str) -> None:
        self.tools.cancel(seq)
        self.scheduler.finish(seq)
        seq.in_flight = False
        self._observer.finished(reason, time.monotonic() - seq.arrived_at)
