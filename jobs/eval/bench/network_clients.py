"""Benchmark clients that send requests over the network, to an engine service or an OpenAI-compatible server."""

import asyncio
import itertools
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import httpx

from jobs.eval.bench.core_client import TOP_K
from jobs.eval.bench.request_results import RequestResult, TokenCounts
from jobs.eval.bench.workload import BenchRequest, Load
from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2, engine_pb2_grpc
from nanochat_core.tokenizer import SPECIAL_TOKENS

# Prompts for servers that take text consist of these common words. Most tokenizers encode each word as one token.
_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem "
    "hand part place case week company system program question work government number night point home water room "
    "mother area money story fact month lot right study book eye job word business issue side kind head house "
    "service friend father power hour game line end member law car city"
)
WORDS = _TEXT.split()
# Numbers of words of two trial prompts. From the token counts of the two prompts, the client computes the number of
# tokens per word and of the chat template.
_FEW_WORDS, _MANY_WORDS = 8, 32
_CONNECT_SECONDS = 10.0


class NetworkClient(ABC):
    """Base class of the network clients. It has an event loop that keeps connections open between runs.

    The attributes ``vocabulary``, ``longest`` and ``description`` are as in
    :class:`~jobs.eval.bench.core_client.CoreClient`, except that ``longest`` is None if the server does not report it,
    and that for a server that takes text, each id of a prompt stands for a word.
    """

    vocabulary: int
    longest: int | None
    description: dict[str, Any]

    def __init__(self, timeout_seconds: float) -> None:
        self._runner = asyncio.Runner()
        self._timeout_seconds = timeout_seconds

    def run(self, requests: Sequence[BenchRequest], load: Load) -> list[RequestResult]:
        """Send each request when ``load`` says so, and wait for all answers. The results are in the requests' order."""
        return self._runner.run(self._drive(requests, load))

    def close(self) -> None:
        self._runner.run(self._disconnect())
        self._runner.close()

    async def _drive(self, requests: Sequence[BenchRequest], load: Load) -> list[RequestResult]:
        results: list[RequestResult] = []
        in_flight: set[asyncio.Task[None]] = set()
        started = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for number, request in enumerate(requests):
                while not load.due(number, now := time.perf_counter() - started, len(in_flight)):
                    if (wait := load.intended(number, now) - now) > 0:
                        await asyncio.sleep(wait)
                    else:
                        await asyncio.wait(in_flight, return_when=asyncio.FIRST_COMPLETED)
                results.append(RequestResult(load.intended(number, now), now))
                task = group.create_task(self._answer(request, results[-1], started))
                in_flight.add(task)
                task.add_done_callback(in_flight.discard)
        return results

    async def _answer(self, request: BenchRequest, result: RequestResult, started: float) -> None:
        """Send one request and record its tokens, or its failure."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                async for choice, tokens, counts in self._stream(request):
                    now = time.perf_counter() - started
                    result.tokens_came(now, choice, tokens)
                    result.counts += counts
        except TimeoutError:
            result.failed(time.perf_counter() - started, f"no end after {self._timeout_seconds:g} seconds")
        except RequestFailed as error:
            result.failed(time.perf_counter() - started, str(error), refused=error.refused)
        else:
            result.finished = time.perf_counter() - started

    @abstractmethod
    def _stream(self, request: BenchRequest) -> AsyncIterator[tuple[int, int, list[TokenCounts]]]:
        """Send a request and stream its answer. Raises :class:`RequestFailed` unless the answer is complete.

        Each item has the index of a choice, the number of its new tokens, and the token counts of choices that have
        just ended.
        """

    @abstractmethod
    async def _disconnect(self) -> None: ...


class RequestFailed(Exception):
    """A request was not answered. Failures with the same cause have the same message, so that they can be counted."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class GrpcClient(NetworkClient):
    """A client of an engine service. Prompts are token ids, and outputs have exactly the wanted length."""

    def __init__(self, address: str, timeout_seconds: float) -> None:
        """Connect to ``host:port``. Raises a :class:`UserError` if no engine with a model answers there."""
        super().__init__(timeout_seconds)
        self._numbers = itertools.count()
        try:
            info = self._runner.run(self._connect(address))
        except grpc.aio.AioRpcError as error:
            self.close()
            raise UserError(
                f"no engine answers at grpc://{address} ({error.code().name}: {error.details()}); start one, or wait "
                "until it has logged that it is ready"
            ) from error
        self.vocabulary, self.longest = info.vocab_size - len(SPECIAL_TOKENS), info.context_length
        self.description = {
            "model": info.name,
            "revision": info.revision,
            "parameters": info.parameters,
            "dtype": info.compute_dtype,
        }

    async def _connect(self, address: str) -> engine_pb2.ModelInfo:
        # The reply contains the tokenizer, which can be larger than gRPC's default limit, so no limit is set.
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self._stub = engine_pb2_grpc.EngineStub(self._channel)
        info: engine_pb2.ModelInfo = await self._stub.GetModel(engine_pb2.GetModelRequest(), timeout=_CONNECT_SECONDS)
        return info

    async def _disconnect(self) -> None:
        await self._channel.close()

    async def _stream(self, request: BenchRequest) -> AsyncIterator[tuple[int, int, list[TokenCounts]]]:
        message = engine_pb2.GenerateRequest(
            request_id=f"bench-{next(self._numbers)}",
            prompt_token_ids=request.prompt,
            n=request.n,
            sampling=engine_pb2.SamplingParams(
                temperature=request.temperature,
                top_k=TOP_K if request.temperature else 0,
                max_tokens=request.output_tokens,
            ),
        )
        unfinished = request.n
        call = self._stub.Generate(message)
        try:
            async for chunk in call:
                counts = []
                if chunk.finish_reason:
                    unfinished -= 1
                    usage = chunk.usage
                    counts = [TokenCounts(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens)]
                yield chunk.index, len(chunk.tokens), counts
        except grpc.aio.AioRpcError as error:
            refused = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            raise RequestFailed(error.code().name, refused=refused) from error
        finally:
            call.cancel()
        if unfinished:
            raise RequestFailed("the stream ended early")


class HttpClient(NetworkClient):
    """A client that streams chat completions from an OpenAI-compatible server.

    A prompt consists of words that make about the wanted number of tokens; the server reports the exact number. An
    output has the wanted length unless the model ends its answer earlier. For latencies, a chunk with text counts as
    one token.
    """

    def __init__(self, url: str, model: str, key: str, timeout_seconds: float) -> None:
        """Connect to the server at ``url``; the URL ends with ``/v1``.

        If ``model`` is empty, the client uses the first model that the server lists. If ``key`` is empty, the client
        sends no bearer token. Raises UserError if the server does not answer two trial requests completely, or if it
        does not report token counts.
        """
        super().__init__(timeout_seconds)
        self.vocabulary, self.longest = len(WORDS), None
        self._url, self._model = url.rstrip("/"), model
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None),
        )
        try:
            self._runner.run(self._prepare())
        except (RequestFailed, TimeoutError) as error:
            self.close()
            raise UserError(f"{self._url} cannot be measured: {error or 'it does not answer'}") from error
        self.description = {"model": self._model}

    async def _prepare(self) -> None:
        """Find the model's name, the number of tokens per word and the number of tokens of the chat template."""
        async with asyncio.timeout(self._timeout_seconds):
            self._model = self._model or await self._first_model()
            self._template_tokens, self._tokens_per_word = 0.0, 1.0
            few, many = await self._prompt_tokens(_FEW_WORDS), await self._prompt_tokens(_MANY_WORDS)
            self._tokens_per_word = max((many - few) / (_MANY_WORDS - _FEW_WORDS), 1.0)
            self._template_tokens = few - _FEW_WORDS * self._tokens_per_word

    async def _prompt_tokens(self, words: int) -> int:
        stream = self._stream(BenchRequest(tuple(range(words)), 1))
        return sum([count.prompt async for _, _, counts in stream for count in counts])

    async def _first_model(self) -> str:
        try:
            reply = await self._client.get(f"{self._url}/models")
            reply.raise_for_status()
            return str(reply.json()["data"][0]["id"])
        except httpx.HTTPStatusError as error:
            raise RequestFailed(f"GET /models gives HTTP status {error.response.status_code}") from error
        except httpx.HTTPError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise RequestFailed("it lists no model; name one with --model") from error

    async def _disconnect(self) -> None:
        await self._client.aclose()

    async def _stream(self, request: BenchRequest) -> AsyncIterator[tuple[int, int, list[TokenCounts]]]:
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": self._text(request.prompt)}],
            "max_tokens": request.output_tokens,
            "temperature": request.temperature,
            "n": request.n,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        usage: dict[str, Any] | None = None
        try:
            async with self._client.stream("POST", f"{self._url}/chat/completions", json=body) as reply:
                if reply.status_code != httpx.codes.OK:
                    refused = reply.status_code == httpx.codes.TOO_MANY_REQUESTS
                    raise RequestFailed(f"HTTP status {reply.status_code}", refused=refused)
                async for chunk in _events(reply):
                    usage = chunk.get("usage") or usage
                    for choice in chunk["choices"]:
                        if choice["delta"].get("content"):
                            yield choice["index"], 1, []
            if usage is None:
                raise RequestFailed("the stream has no usage (stream_options.include_usage)")
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
            counts = [TokenCounts(usage["prompt_tokens"], usage["completion_tokens"], cached)]
        except httpx.HTTPError as error:
            raise RequestFailed(type(error).__name__) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestFailed("the answer is not of the form of chat completions") from error
        yield 0, 0, counts

    def _text(self, prompt: Sequence[int]) -> str:
        words = max(round((len(prompt) - self._template_tokens) / self._tokens_per_word), 1)
        return " ".join(WORDS[i] for i in prompt[:words])


async def _events(reply: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON values of server-sent events up to ``[DONE]``.

    Raises RequestFailed if the stream has an error or no end.
    """
    async for line in reply.aiter_lines():
        field, _, value = line.partition(":")
        if field != "data":
            continue
        if value.strip() == "[DONE]":
            return
        event = json.loads(value)
        if "error" in event:
            raise RequestFailed("an error in mid-stream")
        yield event
    raise RequestFailed("the stream ended early")
