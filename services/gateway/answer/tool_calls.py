"""Finds calls of the client's tools in the model's text.

The model writes a call as a whole answer: ``{"name": ..., "arguments": ...}``. If an answer begins with a brace, the
engine makes sure that it is such a call (``schemas.call_schema``).
"""

import dataclasses
import re
import uuid

from services.gateway.answer.choice_decoder import Call, Delta

# The part of a call that precedes its arguments. The pattern matches only once the first character of the arguments has
# arrived. So an optional space before the arguments is always a part of the match, however the text is cut into deltas.
_HEAD = re.compile(r'\{"name": ?"([A-Za-z0-9_-]{1,64})", ?"arguments": ?(?=[^ ])')


class CallReader:
    """Turns the text of one choice into a call if the text begins with a brace; other text passes unchanged.

    The concatenation of the results does not depend on how the text is cut into deltas. A call is reported only once
    its name and the first character of its arguments have arrived. If the answer ends before that, its text is reported
    as text.
    """

    def __init__(self) -> None:
        self._is_call: bool | None = None  # None until there is text
        self._held = ""  # text that is not passed on yet
        self._head_seen = False

    def read(self, delta: Delta) -> Delta:
        """Converts the decoder's next ``delta`` of the choice to the delta that the client gets."""
        if self._is_call is None and delta.text:
            self._is_call = delta.text.startswith("{")
        if not self._is_call:
            return delta
        self._held += delta.text
        call = None
        if not self._head_seen and (head := _HEAD.match(self._held)):
            self._head_seen = True
            self._held = self._held[head.end() :]
            call = Call(f"call_{uuid.uuid4().hex[:24]}", head[1])
        if not self._head_seen:
            text, self._held = (self._held, "") if delta.finish_reason else ("", self._held)
            return dataclasses.replace(delta, text=text)
        # A brace at the end is held back, because the call's own last brace is not a part of the arguments.
        passed = self._held.removesuffix("}")
        # A stop string may cut the text after a brace within the arguments. Such a call is not complete.
        complete = delta.finish_reason == "stop" and delta.stop_string is None and passed != self._held
        if delta.finish_reason and not complete:
            passed = self._held
        self._held = self._held[len(passed) :]
        call = call or Call()
        call.arguments = passed
        reason = "tool_calls" if complete else delta.finish_reason
        return dataclasses.replace(
            delta, text="", call=call if call.id or call.arguments else None, finish_reason=reason
        )
