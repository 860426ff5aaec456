"""Example answers for the OpenAPI description."""

from __future__ import annotations

from typing import Any

from services.gateway.errors import ERROR_RESPONSES

_USAGE = {
    "prompt_tokens": 19,
    "completion_tokens": 31,
    "total_tokens": 50,
    "prompt_tokens_details": {"cached_tokens": 16},
}

_CHAT = {
    "id": "chatcmpl-0b5c",
    "object": "chat.completion",
    "created": 1760000000,
    "model": "nanochat",
    "system_fingerprint": "fp_4f1c09d27a3e",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "1234 * 5678 is 7006652.",
                "refusal": None,
                "nanochat": {
                    "tool_events": [
                        {"type": "call", "call_index": 0, "code": "1234 * 5678", "offset": 15},
                        {
                            "type": "result",
                            "call_index": 0,
                            "status": "ok",
                            "output": "7006652",
                            "duration_seconds": 0.002,
                        },
                    ]
                },
            },
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": _USAGE,
}

_CHUNK = (
    'data: {"id":"chatcmpl-0b5c","object":"chat.completion.chunk","created":1760000000,"model":"nanochat",'
    '"system_fingerprint":"fp_4f1c09d27a3e","choices":[{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}]}\n\n'
)

_CHAT_STREAM = (
    _CHUNK % ('{"role":"assistant","content":""}', "null")
    + _CHUNK % ('{"content":"1234 * 5678 is "}', "null")
    + _CHUNK
    % (
        '{"nanochat":{"tool_events":[{"type":"call","call_index":0,"code":"1234 * 5678","offset":15}]}}',
        "null",
    )
    + _CHUNK % ('{"content":"7006652."}', "null")
    + _CHUNK % ("{}", '"stop"')
    + "data: [DONE]\n\n"
)

_COMPLETION = {
    "id": "cmpl-77aa",
    "object": "text_completion",
    "created": 1760000000,
    "model": "nanochat",
    "system_fingerprint": "fp_4f1c09d27a3e",
    "choices": [{"index": 0, "text": " there was a fox.", "logprobs": None, "finish_reason": "length"}],
    "usage": _USAGE,
}

CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer; with `stream` as server-sent events that end with `[DONE]`.",
        "content": {"application/json": {"example": _CHAT}, "text/event-stream": {"example": _CHAT_STREAM}},
    },
    **ERROR_RESPONSES,
}

COMPLETION_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The continuation; with `stream` as server-sent events that end with `[DONE]`.",
        "content": {"application/json": {"example": _COMPLETION}},
    },
    **ERROR_RESPONSES,
}
