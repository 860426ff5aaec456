"""Turns sampled tokens and tool events into outputs, and decides when a choice ends."""

from nanochat_core.engine.request import FinishReason, Output, Token, ToolResult, Usage
from nanochat_core.engine.sequence import Sequence


class StepOutputs:
    """Collects the outputs of one step."""

    def __init__(self) -> None:
        self._outputs: list[Output] = []
        self._latest: dict[Sequence, Output] = {}

    def take(self) -> list[Output]:
        """Return the outputs since the last call, and remove them from this object."""
        outputs, self._outputs = self._outputs, []
        self._latest.clear()
        return outputs

    def add_result(self, seq: Sequence, result: ToolResult, forced: list[Token]) -> None:
        """Add a tool's result and ``forced``, the tokens that show the result to the model."""
        output = self.for_tokens(seq)
        output.tool_events.append(result)
        output.tokens += forced

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        output = self.of(seq)
        output.finish_reason = reason
        output.usage = Usage(seq.prompt_length, seq.completion_length, seq.cached_prompt_tokens)

    def of(self, seq: Sequence) -> Output:
        """The latest output of ``seq`` in this step. If the sequence has no output yet, this method begins one."""
        return self._latest.get(seq) or self._begin(seq)

    def for_tokens(self, seq: Sequence) -> Output:
        """The output that receives the next tokens of ``seq``. Tokens never follow tool events in the same output."""
        output = self.of(seq)
        return self._begin(seq) if output.tool_events else output

    def _begin(self, seq: Sequence) -> Output:
        output = self._latest[seq] = Output(
            request_id=seq.request.id, index=seq.choice, prompt_tokens=seq.prompt_scores
        )
        seq.prompt_scores = []
        self._outputs.append(output)
        return output


def finish_reason(seq: Sequence) -> FinishReason | None:
    """Return why ``seq`` ends after its last token, or None if the sequence continues.

    If the sequence has a constraint, this function also advances the constraint's matcher by that token, unless the
    token is a stop token.
    """
    matcher, stops = seq.matcher, seq.request.sampling.stop_token_ids
    token, full = seq.tokens[-1], len(seq.tokens) >= seq.max_length
    if token in stops:
        return FinishReason.STOP
    if matcher is not None and matcher.advance(token) and (full or not stops):
        return FinishReason.STOP  # no stop token will follow, but the text matches and cannot become longer
    return FinishReason.LENGTH if full else None
