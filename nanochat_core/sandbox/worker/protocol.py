"""Messages between the executor, a fork server and its workers. All sides use this module.

The executor and the fork server exchange frames over a socket that keeps message boundaries. A frame is a list of byte
fields. The first frame is the *setup*; the server answers ``READY``. Each further frame of the executor asks for one
worker. The frame has a number for the worker and the path of its scratch folder, and carries the descriptors of its
pipes. The worker answers ``STARTED`` with a pidfd of itself, before it applies the last layer of its isolation, the
system-call filter. The kernel adds the worker's process id to this message. If the server cannot fork, it answers
``FAILED`` with a reason. When a worker has ended, the server sends ``EXITED`` with the wait status and the CPU seconds.

If workers may start threads, the server adds a descriptor to ``READY``. Through this descriptor, the kernel asks the
executor each time a worker wants to start a thread, and the executor answers (:mod:`threads`). Without the descriptor,
workers cannot start threads.

The executor writes one frame, the *request*, to a worker's stdin, then the bytes that the code can read from stdin, and
closes the pipe. The worker reads the request once every layer of the isolation is active. Then it writes to the result
pipe: ``BEGUN`` once the request has arrived, and later a *claim* about how the code ended. The code can forge the
claim. Therefore the executor bounds the claim's size, never trusts the claim, and uses it only for the answer to this
call and for the files of its session.
"""

import struct

READY = b"+"
BEGUN = b"*"
STARTED, FAILED, EXITED = b"s", b"f", b"x"

# Where the scratch file systems of workers come from. With MOUNTS_EXIST, workers mount them in a mount namespace that
# the launcher has made. With MOUNTS_IF_ALLOWED, the fork server makes such a namespace if the kernel allows it;
# otherwise, workers get folders. With NO_MOUNTS, which only tests use, workers get folders in any case.
MOUNTS_EXIST, MOUNTS_IF_ALLOWED, NO_MOUNTS = b"e", b"a", b"n"

# The kinds of claims. A claim is a worker's report of how the code ended, and its first byte is its kind.
VALUE, NOTHING, ERROR, MEMORY, DENIED, FILE_SIZE, NO_SPACE = _KINDS = tuple(bytes([byte]) for byte in b"vnemdsf")

_CLAIM_HEADER = struct.Struct("!cH")
MAX_ERROR_BYTES = 1000
CLAIM_OVERHEAD = len(BEGUN) + _CLAIM_HEADER.size + MAX_ERROR_BYTES


# If the caller wants files, a worker's report has this header before the result and the files: the length of the
# result, and whether files are missing because of the limits or an error.
_OUTPUT_HEADER = struct.Struct("!I?")


def pack(fields: list[bytes]) -> bytes:
    """Build a frame: the total length, then for each field its length and its bytes."""
    body = b"".join(struct.pack("!I", len(field)) + field for field in fields)
    return struct.pack("!I", len(body)) + body


def unpack(body: bytes) -> list[bytes]:
    """Split the body of a frame into its fields. Untrusted code never writes a frame, so the frame is well formed."""
    fields, at = [], 0
    while at < len(body):
        (length,) = struct.unpack_from("!I", body, at)
        fields.append(body[at + 4 : at + 4 + length])
        at += 4 + length
    return fields


def pack_claim(kind: bytes, error: bytes = b"", result: bytes = b"") -> bytes:
    """Build a claim, the worker's report of how the code ended.

    ``result`` is the result's text, or :func:`pack_outputs` of the text and the files. Of ``error``, only the first
    :data:`MAX_ERROR_BYTES` bytes are kept.
    """
    error = error[:MAX_ERROR_BYTES]
    return _CLAIM_HEADER.pack(kind, len(error)) + error + result


def unpack_claim(data: bytes) -> tuple[bytes, bytes, bytes] | None:
    """Split a claim, a worker's report, into kind, error and result; ``None`` if ``data`` is not a valid claim."""
    if len(data) < _CLAIM_HEADER.size:
        return None
    kind, length = _CLAIM_HEADER.unpack_from(data)
    end = _CLAIM_HEADER.size + length
    if kind not in _KINDS or length > MAX_ERROR_BYTES or len(data) < end:
        return None
    return kind, data[_CLAIM_HEADER.size : end], data[end:]


def pack_outputs(result: bytes, files: list[bytes], cut: bool) -> bytes:
    """Join a result and files (name, content, name, content, ...) for a claim."""
    return _OUTPUT_HEADER.pack(len(result), cut) + result + pack(files)[4:]


def unpack_outputs(data: bytes) -> tuple[bytes, list[bytes], bool]:
    """Undo :func:`pack_outputs`: return the result, the files, and whether files are missing.

    ``data`` can be forged. Files that cannot be read from it count as missing.
    """
    if len(data) < _OUTPUT_HEADER.size:
        return b"", [], True
    length, cut = _OUTPUT_HEADER.unpack_from(data)
    at = _OUTPUT_HEADER.size + length
    result = data[_OUTPUT_HEADER.size : at]
    fields: list[bytes] = []
    while at + 4 <= len(data):
        (size,) = struct.unpack_from("!I", data, at)
        at += 4
        if at + size > len(data):
            return result, fields, True
        fields.append(data[at : at + size])
        at += size
    return result, fields, cut
