"""Restores the state of a choice that another engine began.

The *said* tokens and events are those that the other engine has already reported to the client. The state of a sequence
(unfinished code, tool calls and the matcher of a constraint) follows from its tokens. The said tokens are therefore
appended one by one, as if they had just been sampled. The model does not run during this replay. Keys and values of the
said tokens are computed later, like those of a prompt.
"""

import collections
import dataclasses

from nanochat_core.engine.outputs import finish_reason
from nanochat_core.engine.request import Continuation, FinishReason, Token, ToolCall, ToolResult
from nanochat_core.engine.sequence import Sequence
from nanochat_core.engine.tools import ToolLoop
from nanochat_core.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class End:
    """The work that remains after the replay of another engine's tokens, before the next token is sampled."""

    unsaid: tuple[Token, ...] = ()  # tokens of a tool's output that are not reported yet, but are in the sequence
    finish_reason: FinishReason | None = None
    call: ToolCall | None = None  # a call whose result the other engine has not reported
    call_reported: bool = False  # whether the other engine has reported this call


def replay(seq: Sequence, said: Continuation, tools: ToolLoop) -> End:
    """Append the tokens of ``said`` to ``seq``, which has only the tokens of its prompt so far.

    ``said`` is what another engine has already reported to the client.

    Raises a :class:`UserError` if the model, the tools and the constraint cannot have produced these tokens and events.
    """
    if said.tokens:
        seq.scored = seq.prompt_length  # not scored again: the client got the scores with the first token
    return _Replay(seq, said, tools).run()


class _Replay:
    def __init__(self, seq: Sequence, said: Continuation, tools: ToolLoop) -> None:
        self._seq, self._tools = seq, tools
        self._tokens = collections.deque(said.tokens)
        self._events = collections.deque(said.tool_events)

    def run(self) -> End:
        end = None
        call = self._tools.scan_prompt(self._seq)
        while end is None and (call or self._tokens):
            if call:
                end, call = self._read_output(call), None
            else:
                end, call = self._append(self._tokens.popleft())
        if self._tokens:
            raise self._error("has tokens after its end, or after a call without its result")
        if self._events:
            raise self._error("has a tool event for which its tokens have no call")
        return end or End()

    def _append(self, token: Token) -> tuple[End | None, ToolCall | None]:
        """Append a sampled token. Returns an End if the token ends the choice, or the call that the token completes."""
        seq, matcher = self._seq, self._seq.matcher
        if token.forced:
            raise self._error("has a forced token that does not follow a call")
        if matcher and token.id in seq.request.sampling.stop_token_ids and not matcher.complete:
            raise self._error("ends before its text matches the constraint")
        seq.tokens.append(token.id)
        reason = finish_reason(seq)
        if matcher and matcher.failed:
            raise self._error("breaks the constraint")
        if reason:
            return End(finish_reason=reason), None
        return None, self._tools.observe(seq)

    def _read_output(self, call: ToolCall) -> End | None:
        """Append the output of a call. Returns None if the client has all of the output and the choice goes on."""
        seq = self._seq
        if not self._events:
            return End(call=call)
        if self._events.popleft() != call:
            raise self._error(f"has a tool event that is not the call of {call.code!r}")
        if not self._events:
            return End(call=call, call_reported=True)
        result = self._events.popleft()
        if not isinstance(result, ToolResult) or result.call_index != call.call_index:
            raise self._error("has a tool event that is not the result of the call before it")
        output = self._tools.append_output(seq, result)
        unsaid = collections.deque(output)
        while unsaid and self._tokens:
            said = self._tokens.popleft()
            if not said.forced or said.id != unsaid.popleft().id:
                raise self._error("has a token that is not part of the tool's output")
        if len(output) == 0 or len(seq.tokens) >= seq.max_length:
            return End(tuple(unsaid), FinishReason.LENGTH)
        return End(tuple(unsaid)) if unsaid else None

    def _error(self, reason: str) -> UserError:
        choice, replayed = self._seq.choice, self._seq.completion_length
        return UserError(f"continued choice {choice} {reason} (after {replayed} tokens); no engine can have said it")
