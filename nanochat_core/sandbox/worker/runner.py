"""Runs one call: waits for the request, runs the code, reports, and waits to be killed."""

import _ast
import _signal
import _sitebuiltins
import _thread
import builtins
import errno
import linecache
import os
import struct
import sys
import traceback
import types
from collections.abc import Callable

import outputs
import protocol

_REQUESTS, _RESULT = 0, 3
_PyCF_ONLY_AST, _PyCF_ALLOW_TOP_LEVEL_AWAIT, _CO_COROUTINE = 0x400, 0x2000, 0x80
_NAME = "<code>"
# Maximum number of frames in a printed traceback. Without this limit, printing the traceback of an endless recursion
# can take longer than the call itself.
_SHOWN_FRAMES = 1100
_Module = type(sys)
# Size of a thread's stack. It is smaller than the default, because the stacks of all threads count as memory of the
# call.
_THREAD_STACK_BYTES = 4 << 20
# Address space that is freed when the code raises an exception, so that the worker can report the exception even if
# memory has run out. Nothing is written to this space, so it takes no physical memory.
_reserve = [bytes(1 << 20)]


def warm_up() -> None:
    """Run code that every call needs, in the fork server. The workers inherit the loaded modules and filled caches."""
    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D")
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D")
    builtins.help = _sitebuiltins._Helper()
    _thread.stack_size(_THREAD_STACK_BYTES)
    _evaluate("len('warm')", {})
    try:
        _evaluate("1 / 0", {})
    except ZeroDivisionError as error:
        traceback.format_exception(error)


def serve() -> None:
    """Run one call. Never returns. The caller must have isolated the worker."""
    text_format, output_bytes, file_bytes, max_files, endings, unchanged, argv, code, *files = protocol.unpack(
        _read_frame()
    )
    sys.argv = ["", *(argument.decode() for argument in protocol.unpack(argv))]
    given = dict(zip(files[::2], files[1::2], strict=True))
    for name, content in given.items():
        if b"/" in name:
            os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)
    collect = None
    if file_bytes:
        known = {} if unchanged else given
        collect = outputs.collector(known, int(file_bytes), int(max_files), tuple(endings.split(b"\0")))
    os.write(_RESULT, protocol.BEGUN)
    _run_and_report(code, str if text_format == b"str" else repr, int(output_bytes), collect)


def _read_frame() -> bytes:
    (length,) = struct.unpack("!I", _read_exactly(4))
    return _read_exactly(length)


def _read_exactly(count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.read(_REQUESTS, count - len(data))
        if not piece:
            os._exit(0)  # the executor has ended or no longer needs this worker
        data += piece
    return bytes(data)


def _run_and_report(
    code: bytes,
    to_text: Callable[[object], str],
    output_bytes: int,
    collect: Callable[[object], tuple[list[bytes], bool]] | None,
) -> None:
    """Run ``code``, then report how it ended, with its result and the files from ``collect``.

    Local variables refer to the functions that are needed after the code has run. The report is therefore right even if
    the code overwrites, for example, ``os.write``. Code that manipulates more can falsify only its own report.
    """
    write, close, wait = os.write, os.close, _signal.pause
    pack_claim, pack_outputs = protocol.pack_claim, protocol.pack_outputs
    describe, show, errors = _describe, traceback.print_exception, sys.stderr
    module = _Module("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    kind, message, result = protocol.NOTHING, b"", b""
    value: object = None
    try:
        value = _evaluate(code.decode("utf-8"), module.__dict__)
        if value is not None:
            # One byte above the limit tells the executor that the text is longer. The first cut counts characters, not
            # bytes. It never cuts too much, because each character has at least one byte.
            result = to_text(value)[: output_bytes + 1].encode("utf-8", "replace")[: output_bytes + 1]
            kind = protocol.VALUE
    except BaseException as error:
        _reserve.clear()
        kind, message = describe(error)
        try:
            sys.stderr = errors
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename != _NAME:
                trace = trace.tb_next
            error.__traceback__ = trace
            show(type(error), error, trace, limit=_SHOWN_FRAMES, file=errors)
        except BaseException:  # noqa: S110 - the claim reports an exception that cannot be printed
            pass
    try:
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # as at the end of a program, wait for the threads
    except BaseException:  # noqa: S110 - the code can have changed the module
        pass
    if collect is not None:
        result = pack_outputs(result, *collect(value))
    claim = pack_claim(kind, message, result)
    while claim:
        claim = claim[write(_RESULT, claim) :]
    close(_RESULT)
    while True:
        wait()


def _evaluate(code: str, namespace: dict[str, object]) -> object:
    """Execute ``code`` and return the value of the expression at its end; ``None`` if there is no such expression.

    Outside of functions, the code may use ``await``, ``async for`` and ``async with``.
    """
    # The code is stored in linecache's cache, from which tracebacks show lines. With the modification time None, the
    # cache keeps the entry although there is no such file.
    linecache.cache[_NAME] = len(code), None, [line + "\n" for line in code.split("\n")], _NAME
    tree = compile(code, _NAME, "exec", _PyCF_ONLY_AST | _PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    last = None
    if tree.body and type(tree.body[-1]).__name__ == "Expr":
        expression = tree.body.pop().value
        last = compile(_ast.Expression(expression), _NAME, "eval", _PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    body = compile(tree, _NAME, "exec", _PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    parts = [part for part in (body, last) if part is not None]
    if any(part.co_flags & _CO_COROUTINE for part in parts):
        return _run_coroutines(parts, namespace)
    value: object = None
    for part in parts:
        value = eval(part, namespace)  # noqa: S307 - running this code is the purpose of a worker
    return value


def _run_coroutines(parts: list[types.CodeType], namespace: dict[str, object]) -> object:
    """Run the parts of the code one after the other, like :func:`_evaluate`, but in an event loop."""
    import asyncio  # imported here, because most calls do not need asyncio, and importing it takes long

    value: object = None
    with asyncio.Runner() as loop:
        for part in parts:
            outcome = eval(part, namespace)  # noqa: S307
            value = loop.run(outcome) if part.co_flags & _CO_COROUTINE else outcome
    return value


def _describe(error: BaseException) -> tuple[bytes, bytes]:
    """How the claim reports an exception: its kind, such as ``protocol.MEMORY``, and a line that says what went wrong.

    The claim is the worker's own report of how the code ended.
    """
    name = type(error).__name__
    try:
        line = " ".join(f"{name}: {error}".split()) if str(error) else name
    except BaseException:
        line = name
    kind = protocol.ERROR
    if isinstance(error, MemoryError):
        kind = protocol.MEMORY
    elif isinstance(error, OSError):
        if error.errno == errno.ENOMEM:
            kind = protocol.MEMORY
        elif error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EROFS):
            kind = protocol.DENIED
        elif error.errno == errno.EFBIG:
            kind = protocol.FILE_SIZE
        elif error.errno in (errno.ENOSPC, errno.EDQUOT):
            kind = protocol.NO_SPACE
    return kind, line[: protocol.MAX_ERROR_BYTES].encode("utf-8", "replace")
