"""Messages between the executor and a worker. Shared by both sides.

Executor to worker, on stdin: two frames, *setup* and *request*, each a list of byte fields; then end of file.
Worker to executor, on the result pipe: ``READY`` when every layer of the isolation is on, ``BEGUN`` when the request
has arrived and the code is next; what follows is the code's own claim about how it ended, and is treated as that:
bounded, never trusted, and without influence on anything but the answer to this one call.
"""

from __future__ import annotations

import struct

READY = b"+"
BEGUN = b"*"

# First byte of a claim.
VALUE, NOTHING, ERROR, MEMORY, DENIED, SCRATCH = (bytes([byte]) for byte in b"vnemds")

_CLAIM_HEADER = struct.Struct("!cH")
MAX_ERROR_BYTES = 1000
CLAIM_OVERHEAD = len(BEGUN) + _CLAIM_HEADER.size + MAX_ERROR_BYTES


def pack(fields: list[bytes]) -> bytes:
    """One frame: total length, then every field with its length."""
    body = b"".join(struct.pack("!I", len(field)) + field for field in fields)
    return struct.pack("!I", len(body)) + body


def unpack(body: bytes) -> list[bytes]:
    """Fields of a frame's body, which came from the executor and is well formed."""
    fields, at = [], 0
    while at < len(body):
        (length,) = struct.unpack_from("!I", body, at)
        fields.append(body[at + 4 : at + 4 + length])
        at += 4 + length
    return fields


def pack_claim(kind: bytes, error: bytes = b"", result: bytes = b"") -> bytes:
    error = error[:MAX_ERROR_BYTES]
    return _CLAIM_HEADER.pack(kind, len(error)) + error + result


def unpack_claim(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Kind, error and result that the code claims, or ``None`` when ``data`` makes no sense."""
    if len(data) < _CLAIM_HEADER.size:
        return None
    kind, length = _CLAIM_HEADER.unpack_from(data)
    end = _CLAIM_HEADER.size + length
    if kind not in (VALUE, NOTHING, ERROR, MEMORY, DENIED, SCRATCH) or length > MAX_ERROR_BYTES or len(data) < end:
        return None
    return kind, data[_CLAIM_HEADER.size : end], data[end:]
