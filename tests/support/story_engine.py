"""An engine with known answers that can continue another engine's answer, and that can die, hang and drain."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from nanochat_core.protos import engine_pb2 as pb
from tests.support.scripted_engine import ScriptedEngine


@dataclasses.dataclass(frozen=True)
class Step:
    """One token of a story, and the tool events that come with it."""

    token: int
    forced: bool = False
    events: tuple[pb.ToolEvent, ...] = ()


# Returns the whole answer of the choice with the given index.
Story = Callable[[pb.GenerateRequest, int], Sequence[Step]]


class StoryEngine(ScriptedEngine):
    """Streams the story of each choice, with one token in each chunk, and alternates between the choices.

    A request may contain the beginning of an answer. Like a real engine, this engine does not send those tokens again,
    but counts them as completion tokens.

    Attributes:
        story: makes the answers.
        steps: number of tokens that the engine may still send, in all calls together; None sets no limit.
        pause: seconds before each token.
        wrong: answer beginnings from requests that differ from the stories.
    """

    def __init__(self, story: Story, **options: Any) -> None:
        super().__init__(**options)
        self.story = story
        self.steps: int | None = None
        self.pause = 0.0
        self.wrong: list[pb.Continuation] = []
        self.script = self._tell
        self._draining = False
        self._changed = asyncio.Event()

    def allow(self, steps: int | None) -> None:
        """Lets the engine send ``steps`` more tokens; None removes the limit."""
        self.steps = None if steps is None else (self.steps or 0) + steps
        self._notify()

    def hang(self) -> None:
        """Stops like a process after SIGSTOP: the connections stay open, but the engine answers nothing."""
        self.awake.clear()

    def resume(self) -> None:
        """Lets the engine answer again after :meth:`hang`."""
        self.awake.set()
        self._notify()

    async def start(self) -> None:
        """Starts the engine. It may be started again after a drain."""
        self._draining = False
        self.awake.set()
        await super().start()

    async def drain(self) -> None:
        """Begins a shutdown: announces it to all running calls, finishes these calls, and refuses new calls."""
        self._draining = True
        await self.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _tell(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        await self.awake.wait()
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the engine is shutting down")
        if request.weights_digest not in ("", self.info.digests["model.safetensors"]):
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "other weights")
        told_of_drain = False
        for chunk in self._rest(request):
            while not self.awake.is_set() or self.steps == 0 or (self._draining and not told_of_drain):
                if self.awake.is_set() and self._draining and not told_of_drain:
                    told_of_drain = True
                    yield pb.GenerateChunk(draining=True)
                else:
                    await self._changed.wait()
            if self.steps is not None:
                self.steps -= 1
            await asyncio.sleep(self.pause)
            yield chunk

    def _rest(self, request: pb.GenerateRequest) -> list[pb.GenerateChunk]:
        """Returns the chunks that are still to be sent. The choices take turns."""
        said = {continuation.index: continuation for continuation in request.continued}
        rests = []
        for index in range(max(request.n, 1)):
            continuation = said.get(index, pb.Continuation())
            if continuation.finished:
                continue
            steps, known = self.story(request, index), continuation.tokens
            before = steps[: len(known)]
            events = [event for step in before for event in step.events]
            if [(step.token, step.forced) for step in before] != [(token.id, token.forced) for token in known] or (
                events != list(continuation.tool_events)
            ):
                self.wrong.append(continuation)
            rests.append([self._chunk(request, index, steps, k) for k in range(len(known), len(steps))])
        longest = max(map(len, rests), default=0)
        return [rest[k] for k in range(longest) for rest in rests if k < len(rest)]

    def _chunk(self, request: pb.GenerateRequest, index: int, steps: Sequence[Step], k: int) -> pb.GenerateChunk:
        step, sampling = steps[k], request.sampling
        token = pb.Token(id=step.token, forced=step.forced)
        if sampling.HasField("logprobs") and not step.forced:
            token.logprob = -(k + 1) / 100
        chunk = pb.GenerateChunk(index=index, tokens=[token], tool_events=step.events)
        if k == len(steps) - 1:
            chunk.finish_reason = pb.FINISH_REASON_STOP
            chunk.usage.prompt_tokens = len(request.prompt_token_ids)
            chunk.usage.completion_tokens = len(steps)
            chunk.usage.cached_prompt_tokens = 1000 if request.continued else 2
        return chunk
