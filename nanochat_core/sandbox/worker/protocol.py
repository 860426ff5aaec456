"""Messages between the executor and a worker. Both sides use this module.

The executor writes two frames to the worker's stdin, *setup* and *request*, and then closes the pipe. Each frame is a
list of byte fields. The worker writes to the result pipe: ``READY`` once every layer of the isolation is active,
``BEGUN`` once the request has arrived, and then a claim about how the code ended. The code can forge the claim.
Therefore the executor bounds the claim's size, never trusts the claim, and uses it only for the answer to this call.
"""

import struct

READY = b"+"
BEGUN = b"*"

# The first byte of a claim is one of these kinds.
VALUE, NOTHING, ERROR, MEMORY, DENIED, SCRATCH = (bytes([byte]) for byte in b"vnemds")

_CLAIM_HEADER = struct.Struct("!cH")
MAX_ERROR_BYTES = 1000
CLAIM_OVERHEAD = len(BEGUN) + _CLAIM_HEADER.size + MAX_ERROR_BYTES


def pack(fields: list[bytes]) -> bytes:
    """Build a frame: the total length, then for each field its length and its bytes."""
    body = b"".join(struct.pack("!I", len(field)) + field for field in fields)
    return struct.pack("!I", len(body)) + body


def unpack(body: bytes) -> list[bytes]:
    """Split the body of a frame into its fields. The executor wrote the frame, so it is well formed."""
    fields, at = [], 0
    while at < len(body):
        (length,) = struct.unpack_from("!I", body, at)
        fields.append(body[at + 4 : at + 4 + length])
        at += 4 + length
    return fields


def pack_claim(kind: bytes, error: bytes = b"", result: bytes = b"") -> bytes:
    """Build a claim from its kind, an error message and the text of the result."""
    error = error[:MAX_ERROR_BYTES]
    return _CLAIM_HEADER.pack(kind, len(error)) + error + result


def unpack_claim(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Split a claim into kind, error and result; ``None`` if ``data`` is not a valid claim."""
    if len(data) < _CLAIM_HEADER.size:
        return None
    kind, length = _CLAIM_HEADER.unpack_from(data)
    end = _CLAIM_HEADER.size + length
    if kind not in (VALUE, NOTHING, ERROR, MEMORY, DENIED, SCRATCH) or length > MAX_ERROR_BYTES or len(data) < end:
        return None
    return kind, data[_CLAIM_HEADER.size : end], data[end:]
