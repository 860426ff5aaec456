"""Converts a client's request to the engine's request: turns, token ids of the prompt and sampling parameters."""

import asyncio
import bisect
import dataclasses
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

from nanochat_core.chat import Message, Part, render_conversation, stop_token_ids
from nanochat_core.protos import engine_pb2
from nanochat_core.tokenizer import ASSISTANT_START, Tokenizer
from services.gateway.engines.model import ServedModel
from services.gateway.errors import ApiError, bad_request, invalid_value, shown
from services.gateway.schemas import (
    Body,
    ChatMessage,
    ChatParameters,
    ChatRequest,
    CompletionRequest,
    FunctionCall,
    FunctionTool,
    TokenizeRequest,
    ToolEvent,
)
from services.gateway.settings import GatewaySettings

T = TypeVar("T")

# Work on at most this many characters or tokens is done without a thread, because handing work to a thread takes about
# as long as encoding this many characters or decoding this many tokens.
_INLINE_SIZE = 16_384
# The engine reads counts as integers of 32 bits. No vocabulary has this many tokens, so the gateway may reduce a larger
# top_k to this value.
_LARGEST_TOP_K = 2**31 - 1
# The engine gets this value for a top_p of 0. For the client 0 means the narrowest choice, but for the engine 0 means
# "off".
_SMALLEST_TOP_P = 1e-6
_BIAS_LIMIT = 100
_SEPARATOR = "\n\n"  # separates the messages of one turn

# Encodes a prompt with the tokenizer of a model, and returns the token ids.
PromptEncoder = Callable[[ServedModel], Awaitable[list[int]]]

# How a conversation's prompt ends. "answer": with the beginning of a new assistant message. "continue": within the last
# message, which is an assistant's. "nothing": after the last message.
Ending = Literal["answer", "continue", "nothing"]


def conversation(messages: Sequence[ChatMessage], tools: Sequence[FunctionTool] = ()) -> list[Message]:
    """Converts the messages to the model's format, in which turns of user and assistant alternate: see :class:`Turns`.

    ``tools`` are the client's tools that the model may call.

    Raises:
        ApiError: 400 if the result of a tool has no call before it, if a tool event is wrong, or if there is nothing
            that the model can read.
    """
    turns = Turns([], tools)
    for i, message in enumerate(messages):
        if message.role == "tool":
            turns.result(message.tool_call_id or "", message.content or "", f"messages[{i}].tool_call_id")
        elif message.role == "assistant":
            for call in message.tool_calls or ():
                turns.called(call.id, call.function.name)
            turns.answer(_assistant_parts(message, i))
        else:
            turns.ask(message.role, message.content or "")
    return turns.finish()


class Turns:
    """Collects messages as alternating turns of user and assistant.

    The model's format has no tokens for a system message or a tool's result, and never has two turns of the same role
    in a row. Therefore all system, developer, user and tool messages between two answers become one user turn, and
    successive assistant messages become one assistant turn. The messages keep their order, and blank lines separate
    them. Instructions at the beginning, and the description of the tools that the model may call, become a system turn,
    which :func:`render_conversation` joins to the first user turn. If the conversation begins with the assistant or has
    no other message, the instructions and the description become a user turn instead.
    """

    def __init__(self, instructions: Sequence[str], tools: Sequence[FunctionTool]) -> None:
        self._instructions = list(instructions)
        self._tools = tools
        self._turns: list[Message] = []
        self._asked: list[str] = []  # the client's texts since the last answer, which become one turn
        self._names: dict[str, str] = {}  # names of the called functions, by the ids of the calls

    def ask(self, role: str, text: str) -> None:
        """Adds a system, developer or user message."""
        leads = role != "user" and not self._turns and not self._asked
        (self._instructions if leads else self._asked).append(text)

    def called(self, call_id: str, name: str) -> None:
        """Records a call of a client's tool, so that the call's result can follow."""
        self._names[call_id] = name

    def result(self, call_id: str, text: str, param: str) -> None:
        """Adds a tool's result. Raises an :class:`ApiError` that names ``param`` if no call has the id ``call_id``."""
        if call_id not in self._names:
            raise invalid_value(f"{param} names no call of an assistant message before it.", param)
        self._asked.append(f"{self._names[call_id]} returned: {text}")

    def answer(self, parts: tuple[Part, ...], *, joined: bool = False) -> None:
        """Adds an assistant message. With ``joined``, no blank line separates it from the assistant message before."""
        self._end_question()
        if self._turns and self._turns[-1].role == "assistant":
            between = () if joined else (Part("text", _SEPARATOR),)
            parts = (*self._turns.pop().parts, *between, *parts)
        self._turns.append(Message("assistant", parts))

    def finish(self) -> list[Message]:
        """Returns the turns, of which there is at least one.

        Raises an :class:`ApiError` with status 400 if there is nothing that the model can read.
        """
        self._end_question()
        texts = self._instructions + ([describe_tools(self._tools)] if self._tools else [])
        if not texts and not self._turns:
            raise bad_request("The request has no message that the model can read.", None)
        if not texts:
            return self._turns
        if self._turns and self._turns[0].role == "user":
            return [Message("system", _text(texts)), *self._turns]
        return [Message("user", _text(texts)), *self._turns]

    def _end_question(self) -> None:
        if self._asked:
            self._turns.append(Message("user", _text(self._asked)))
            self._asked = []


def ending(body: ChatRequest | TokenizeRequest, turns: Sequence[Message]) -> Ending:
    """Returns how the prompt of a conversation ends.

    Raises:
        ApiError: 400 if the request wants to continue a message that is not an assistant's, or wants the prompt both to
            continue a message and to begin a new message.
    """
    continued, began = body.continue_final_message, body.add_generation_prompt
    answered = turns[-1].role == "assistant"
    if continued and (began or not answered):
        problem = "add_generation_prompt excludes it" if began else "the last message is not an assistant's"
        raise invalid_value(f"continue_final_message is impossible: {problem}.", "continue_final_message")
    if continued or (answered and continued is None and began is None):
        return "continue"
    return "nothing" if began is False else "answer"


def _text(texts: Sequence[str]) -> tuple[Part, ...]:
    return (Part("text", _SEPARATOR.join(texts)),)


def _assistant_parts(message: ChatMessage, index: int) -> tuple[Part, ...]:
    calls = "\n".join(call_text(call.function) for call in message.tool_calls or ())
    content = message.content or ""
    if not calls:
        return _with_events(content, message.nanochat.tool_events if message.nanochat else [], index)
    return _text([content, calls] if content else [calls])


def _with_events(content: str, events: Sequence[ToolEvent], message_index: int) -> tuple[Part, ...]:
    """Puts an answer's Python calls and their output into the places where the model wrote them.

    A result without its call is left out, because some clients keep only the last event of a stream.
    """
    parts: list[Part] = []
    position, open_call = 0, None
    for k, event in enumerate(events):
        if event.type == "result":
            if event.call_index == open_call:
                parts.append(Part("python_output", event.output or ""))
            open_call = None
            continue
        offset = event.offset or 0
        if not position <= offset <= len(content):
            where = f"messages[{message_index}].nanochat.tool_events[{k}].offset"
            raise invalid_value(
                f"{where} is {shown(str(offset))}; it must lie between the call before it ({position}) and the end of "
                f"the content ({len(content)} characters).",
                where,
            )
        if offset > position:
            parts.append(Part("text", content[position:offset]))
        parts.append(Part("python", event.code or ""))
        position, open_call = offset, event.call_index
    if position < len(content) or not parts:
        parts.append(Part("text", content[position:]))
    return tuple(parts)


def describe_tools(tools: Sequence[FunctionTool]) -> str:
    """Returns the part of the instructions that describes the client's tools to the model."""
    described = (
        tool.function.model_dump(include={"name", "description", "parameters"}, exclude_none=True) for tool in tools
    )
    lines = [json.dumps(function, ensure_ascii=False) for function in described]
    form = 'To call a function, answer only with {"name": NAME, "arguments": ARGUMENTS}. Functions:'
    return "\n".join([form, *lines])


def call_text(call: FunctionCall) -> str:
    """Returns a call of a client's tool as the model writes it."""
    return f'{{"name": "{call.name}", "arguments": {call.arguments}}}'


@dataclasses.dataclass
class Truncation:
    """Settings and result of leaving out the oldest turns of a conversation."""

    room: int  # number of tokens of the context to keep free for the answer
    left_out_turns: int = 0  # number of turns that the latest prompt leaves out


async def encode_chat(
    model: ServedModel,
    turns: Sequence[Message],
    ending: Ending = "answer",
    *,
    truncation: Truncation | None = None,
) -> list[int]:
    """Returns the token ids of a conversation's prompt, if the context has room for it.

    With ``truncation``, the oldest turns are left out until ``truncation.room`` tokens of the context are free for the
    answer, or half of the context if that is less. The system turn, the last user turn and the turns after it always
    stay. The number of turns that were left out is stored in ``truncation.left_out_turns``.

    Raises:
        ApiError: 400 if the context has no room for the prompt and one more token.
    """
    if truncation is None:
        _refuse_far_too_long(model, _characters(turns), "messages")
        return check_length(model, await encode_turns(model, turns, ending), "messages")
    limit = model.context_length - min(truncation.room, model.context_length // 2)
    ids, truncation.left_out_turns = await off_loop(
        _characters(turns), lambda: _render_newest(model.tokenizer, turns, ending, limit)
    )
    return check_length(model, ids, "messages")


async def encode_turns(model: ServedModel, turns: Sequence[Message], ending: Ending) -> list[int]:
    """Returns the token ids of a conversation's prompt, however long it is."""
    return await off_loop(_characters(turns), lambda: _render(model.tokenizer, turns, ending))


def _characters(turns: Sequence[Message]) -> int:
    return sum(len(part.text) for turn in turns for part in turn.parts)


def _render_newest(tokenizer: Tokenizer, turns: Sequence[Message], ending: Ending, limit: int) -> tuple[list[int], int]:
    """Renders as many of the newest turns as fit into ``limit`` tokens, but at least the last user turn.

    Also returns the number of turns that are left out.
    """
    system = [turn for turn in turns[:1] if turn.role == "system"]
    others = turns[len(system) :]
    starts = [i for i, turn in enumerate(others) if i == 0 or turn.role == "user"]

    def render_from(start: int) -> list[int]:
        return _render(tokenizer, [*system, *others[start:]], ending)

    first = bisect.bisect_left(starts[:-1], True, key=lambda start: len(render_from(start)) <= limit)
    return render_from(starts[first]), starts[first]


def _render(tokenizer: Tokenizer, turns: Sequence[Message], ending: Ending) -> list[int]:
    ids, _ = render_conversation(tokenizer, turns)
    if ending == "answer":
        return [*ids, tokenizer.special_ids[ASSISTANT_START]]
    return ids[:-1] if ending == "continue" else ids


async def encode_prompt(model: ServedModel, prompt: str | list[int]) -> list[int]:
    """Returns the token ids of a prompt.

    A text is encoded as the beginning of a document. Token ids from the client are only checked.
    """
    if isinstance(prompt, str):
        _refuse_far_too_long(model, len(prompt), "prompt")
        return check_length(model, await encode_text(model, prompt, bos=True), "prompt")
    size = model.tokenizer.vocab_size
    if max(prompt) >= size:
        message = f"prompt has the token id {shown(str(max(prompt)))}; {model.info.name} has ids from 0 to {size - 1}."
        raise invalid_value(message, "prompt")
    return check_length(model, prompt, "prompt")


async def encode_text(model: ServedModel, text: str, *, bos: bool) -> list[int]:
    """Returns the token ids of a text. If ``bos`` is true, the token that begins documents comes first."""
    ids = await off_loop(len(text), lambda: model.tokenizer.encode(text))
    return [model.tokenizer.bos_id, *ids] if bos else ids


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Returns the result of ``work``. If the ``size`` of its input is large, ``work`` runs in a thread.

    ``size`` is a number of characters or tokens.
    """
    return work() if size <= _INLINE_SIZE else await asyncio.to_thread(work)


def _refuse_far_too_long(model: ServedModel, characters: int, param: str) -> None:
    # Far too long texts are refused before they are encoded, because encoding them would take long. A text has at least
    # as many tokens as its number of characters divided by the bytes of the longest token, because each character has
    # at least one byte.
    at_least = characters // model.longest_token_bytes
    if at_least > model.context_length:
        raise _too_long(model, f"at least {at_least}", param)


def check_length(model: ServedModel, ids: list[int], param: str) -> list[int]:
    """Returns ``ids`` if the context has room for them and one more token; otherwise raises an :class:`ApiError`."""
    if len(ids) >= model.context_length:
        raise _too_long(model, str(len(ids)), param)
    return ids


def _too_long(model: ServedModel, tokens: str, param: str) -> ApiError:
    # The message has the words of OpenAI's server, and its code, because client libraries recognize the error by them:
    # litellm by the words, and langchain-openai by the code. Newer versions of OpenAI's client library show only the
    # message, so the message contains the code, too.
    code = "context_length_exceeded"
    message = (
        f"This model's maximum context length is {model.context_length} tokens, answer included. However, your "
        f"{param} resulted in {tokens} tokens. Please reduce the length of the {param} ({code})."
    )
    return bad_request(message, param, code)


def most_answer_tokens(request: Body, model: ServedModel, prompt_tokens: int, settings: GatewaySettings) -> int:
    """Returns the largest number of tokens that one answer to a prompt of ``prompt_tokens`` tokens may have."""
    # A limit of 0 becomes 1, because the engine writes at least one token. The gateway then drops that token.
    limit = 1 if request.limit == 0 else request.limit
    room = model.context_length - prompt_tokens
    return min(limit or settings.default_max_tokens or room, room)


def engine_request(
    request: Body,
    model: ServedModel,
    prompt: Sequence[int],
    settings: GatewaySettings,
    *,
    request_id: str,
    caller: str,
    seed: int,
    sandbox: bool,
) -> engine_pb2.GenerateRequest:
    """Builds the engine's request. The ``prompt`` must have fewer tokens than the context length.

    The engine gets the lowest 64 bits of ``seed``. ``sandbox`` says whether the model may run Python in a chat. A logit
    bias that is too large, and a logit bias or a stop token whose id is no token of the model, cause an
    :class:`ApiError` with status 400.
    """
    alternatives = request.logprobs
    if isinstance(request, ChatParameters):
        alternatives = (request.top_logprobs or 0) if request.logprobs else None
    stops: set[int] = set() if request.ignore_eos else set(stop_token_ids(model.tokenizer))
    most = most_answer_tokens(request, model, len(prompt), settings)
    sampling = engine_pb2.SamplingParams(
        temperature=settings.default_temperature if request.temperature is None else request.temperature,
        top_k=min(max(request.top_k or 0, 0), _LARGEST_TOP_K),
        top_p=1.0 if request.top_p is None else max(request.top_p, _SMALLEST_TOP_P),
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        seed=seed % 2**64,
        max_tokens=most,
        min_tokens=min(request.min_tokens or 0, most),
        stop_token_ids=stops | _checked_ids(request.stop_token_ids or [], model, "stop_token_ids"),
        logprobs=alternatives,
        prompt_logprobs=alternatives if isinstance(request, CompletionRequest) and request.echo else None,
        logit_bias=_logit_bias(request.logit_bias or {}, model.tokenizer.vocab_size),
    )
    if (constraint := request.constraint) is not None:
        setattr(sampling, constraint.field, constraint.value)
    return engine_pb2.GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        n=request.n or 1,
        sampling=sampling,
        tools=engine_pb2.ToolPolicy(enabled=sandbox and isinstance(request, ChatParameters)),
        tokenizer_digest=model.tokenizer_digest,
        weights_digest=model.weights,
        priority=request.priority or 0,
        caller=caller,
    )


def _checked_ids(ids: Sequence[int], model: ServedModel, param: str) -> set[int]:
    size = model.tokenizer.vocab_size
    for token_id in ids:
        if not 0 <= token_id < size:
            given = shown(str(token_id))
            raise invalid_value(f"{param} has the token id {given}; use ids from 0 to {size - 1}.", param)
    return set(ids)


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    checked = {}
    for key, value in bias.items():
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 10 else -1
        if not 0 <= token_id < vocab_size:
            message = f"logit_bias names the token {shown(key)!r}; use ids from 0 to {vocab_size - 1}."
            raise invalid_value(message, "logit_bias")
        if abs(value) > _BIAS_LIMIT:
            message = f"logit_bias of token {key} is {value}; use -{_BIAS_LIMIT} to {_BIAS_LIMIT}."
            raise invalid_value(message, "logit_bias")
        checked[token_id] = value
    return checked
