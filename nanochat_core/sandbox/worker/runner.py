"""Runs one call: gives up rights, waits for the request, runs the code, reports, and waits to be killed."""

import _ast
import _signal
import builtins
import errno
import os
import resource
import struct
import sys
from collections.abc import Callable

import kernel
import protocol

_REQUESTS, _RESULT = 0, 3
_PyCF_ONLY_AST = 0x400
_Module = type(sys)
_reserve = [bytearray(1 << 20)]  # freed when memory runs out, so that the report can be made


def serve(result_fd: int) -> None:
    """Run one call and report on ``result_fd``. Never returns."""
    if result_fd != _RESULT:
        os.dup2(result_fd, _RESULT)
        os.close(result_fd)
    # The executor passes no other descriptors. A launcher may have left some open, all with numbers below 1024.
    os.closerange(_RESULT + 1, 1024)
    _isolate(protocol.unpack(_read_frame()))
    os.write(_RESULT, protocol.READY)

    text_format, output_bytes, code = protocol.unpack(_read_frame())
    os.write(_RESULT, protocol.BEGUN)
    _run_and_report(code, str if text_format == b"str" else repr, int(output_bytes))


def _isolate(setup: list[bytes]) -> None:
    """Apply every layer of the isolation. The executor limits memory and CPU time later, with the request."""
    ruleset_attribute, instructions, limits, preload, *rules = setup
    os.environ.clear()  # a launcher and Python's start-up have added PWD and LC_CTYPE
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    for name in preload.decode().split():
        __import__(name)
    kernel.drop_privileges()
    kernel.die_with_parent()  # called after drop_privileges, because a change of credentials may clear this setting
    for number, value in struct.iter_unpack("=IQ", limits):
        inherited = resource.getrlimit(number)[1]
        allowed = value if inherited == resource.RLIM_INFINITY else min(value, inherited)
        resource.setrlimit(number, (allowed, allowed))
    if ruleset_attribute:
        paths = [(os.fsdecode(rule[8:]), struct.unpack_from("=Q", rule)[0]) for rule in rules]
        kernel.restrict_files(ruleset_attribute, paths)
    kernel.restrict_system_calls(instructions)


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


def _run_and_report(code: bytes, to_text: Callable[[object], str], output_bytes: int) -> None:
    """Run ``code`` and write the claim about its end.

    Local variables refer to the functions that are needed after the code has run. The report is therefore right even if
    the code overwrites, for example, ``os.write``. Code that manipulates more can falsify only its own report.
    """
    write, close, wait, pack_claim = os.write, os.close, _signal.pause, protocol.pack_claim
    describe, show, errors = _describe, sys.__excepthook__, sys.stderr
    module = _Module("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = [""]
    try:
        value = _evaluate(code.decode("utf-8"), module.__dict__)
        if value is None:
            claim = pack_claim(protocol.NOTHING)
        else:
            # One byte above the limit tells the executor that the text is longer. The first cut counts characters. This
            # is safe, because each character has at least one byte.
            text = to_text(value)[: output_bytes + 1].encode("utf-8", "replace")[: output_bytes + 1]
            claim = pack_claim(protocol.VALUE, result=text)
    except BaseException as error:
        _reserve.clear()
        claim = describe(error)
        try:
            sys.stderr = errors
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename != "<code>":
                trace = trace.tb_next
            error.__traceback__ = trace
            show(type(error), error, trace)
        except BaseException:  # noqa: S110 - the claim reports an exception that cannot be printed
            pass
    while claim:
        claim = claim[write(_RESULT, claim) :]
    close(_RESULT)
    while True:
        wait()


def _evaluate(code: str, namespace: dict[str, object]) -> object:
    """Execute ``code`` and return the value of the expression at its end; ``None`` if there is none."""
    tree = compile(code, "<code>", "exec", _PyCF_ONLY_AST, dont_inherit=True)
    last = None
    if tree.body and type(tree.body[-1]).__name__ == "Expr":
        expression = tree.body.pop().value
        last = compile(_ast.Expression(expression), "<code>", "eval", dont_inherit=True)
    exec(compile(tree, "<code>", "exec", dont_inherit=True), namespace)  # noqa: S102 - running this code is the purpose of a worker
    return None if last is None else eval(last, namespace)  # noqa: S307


def _describe(error: BaseException) -> bytes:
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
        elif error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            kind = protocol.DENIED
        elif error.errno in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
            kind = protocol.SCRATCH
    claim: bytes = protocol.pack_claim(kind, line[: protocol.MAX_ERROR_BYTES].encode("utf-8", "replace"))
    return claim
