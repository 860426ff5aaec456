"""Example answers for the OpenAPI document."""

import json
from typing import Any

_COMMON = {"created": 1760000000, "model": "nanochat", "system_fingerprint": "fp_4f1c09d27a3e"}
_USAGE = {
    "prompt_tokens": 19,
    "completion_tokens": 31,
    "total_tokens": 50,
    "prompt_tokens_details": {"cached_tokens": 16},
}
_CALL = {"index": 0, "type": "call", "call_index": 0, "code": "1234 * 5678", "offset": 15}
_RESULT = {
    "index": 1,
    "type": "result",
    "call_index": 0,
    "status": "ok",
    "output": "7006652",
    "duration_seconds": 0.002,
}

_CHAT = {
    "id": "chatcmpl-0b5c",
    "object": "chat.completion",
    **_COMMON,
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "1234 * 5678 is 7006652.",
                "refusal": None,
                "nanochat": {"tool_events": [_CALL, _RESULT]},
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": _USAGE,
}


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
    chunk = {"id": "chatcmpl-0b5c", "object": "chat.completion.chunk", **_COMMON, "choices": [choice]}
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


_CHAT_STREAM = (
    _chunk({"role": "assistant", "content": ""})
    + _chunk({"content": "1234 * 5678 is "})
    + _chunk({"nanochat": {"tool_events": [_CALL]}})
    + _chunk({"nanochat": {"tool_events": [_RESULT]}})
    + _chunk({"content": "7006652."})
    + _chunk({}, "stop")
    + "data: [DONE]\n\n"
)

_COMPLETION = {
    "id": "cmpl-77aa",
    "object": "text_completion",
    **_COMMON,
    "choices": [{"index": 0, "text": " there was a fox.", "logprobs": None, "finish_reason": "length"}],
    "usage": _USAGE,
}

CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream`, server-sent events that end with `[DONE]`.",
        "content": {"application/json": {"example": _CHAT}, "text/event-stream": {"example": _CHAT_STREAM}},
    }
}
_RESPONSE = {
    "id": "resp_2f6b",
    "object": "response",
    "created_at": 1760000000,
    "status": "completed",
    "model": "nanochat",
    "output": [
        {
            "id": "msg_91c0",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "1234 * 5678 is ", "annotations": [], "logprobs": []}],
        },
        {
            "id": "ci_77d2",
            "type": "code_interpreter_call",
            "status": "completed",
            "code": "1234 * 5678",
            "container_id": "cntr_0b1e",
            "outputs": [{"type": "logs", "logs": "7006652"}],
        },
        {
            "id": "msg_a4f3",
            "type": "message",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "7006652.", "annotations": [], "logprobs": []}],
        },
    ],
    "usage": {"input_tokens": 19, "output_tokens": 31, "total_tokens": 50},
}

RESPONSES_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The response; with `stream`, server-sent events that end with `response.completed` or, if the "
        "answer reached its largest length, with `response.incomplete`.",
        "content": {"application/json": {"example": _RESPONSE}},
    }
}
_EXECUTION = {
    "object": "sandbox.execution",
    "status": "ok",
    "stdout": "",
    "stderr": "",
    "result": "7006652",
    "error": "",
    "truncated": False,
    "usage": {"wall_seconds": 0.0005, "cpu_seconds": 0.0004, "peak_memory_bytes": 12582912},
    "queue_seconds": 0.0001,
    "profile": "bwrap",
    "files": [],
    "files_complete": False,
    "session_new": False,
}
_EXECUTION_STREAM = (
    'data: {"type": "stdout", "text": "half\\n"}\n\n'
    f"data: {json.dumps({'type': 'result', **_EXECUTION, 'stdout': 'half' + chr(10)})}\n\n"
    "data: [DONE]\n\n"
)

EXECUTION_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The result of the code; with `stream`, server-sent events that end with `[DONE]`.",
        "content": {"application/json": {"example": _EXECUTION}, "text/event-stream": {"example": _EXECUTION_STREAM}},
    }
}
COMPLETION_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The continuation; with `stream`, server-sent events that end with `[DONE]`.",
        "content": {"application/json": {"example": _COMPLETION}},
    }
}
