from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ResultFormat(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESULT_FORMAT_REPR: _ClassVar[ResultFormat]
    RESULT_FORMAT_STR: _ClassVar[ResultFormat]

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_OK: _ClassVar[Status]
    STATUS_ERROR: _ClassVar[Status]
    STATUS_TIMEOUT: _ClassVar[Status]
    STATUS_MEMORY: _ClassVar[Status]
    STATUS_OUTPUT_LIMIT: _ClassVar[Status]
    STATUS_DENIED: _ClassVar[Status]
    STATUS_OVERLOADED: _ClassVar[Status]
RESULT_FORMAT_REPR: ResultFormat
RESULT_FORMAT_STR: ResultFormat
STATUS_UNSPECIFIED: Status
STATUS_OK: Status
STATUS_ERROR: Status
STATUS_TIMEOUT: Status
STATUS_MEMORY: Status
STATUS_OUTPUT_LIMIT: Status
STATUS_DENIED: Status
STATUS_OVERLOADED: Status

class Limits(_message.Message):
    __slots__ = ("wall_seconds", "cpu_seconds", "memory_bytes", "output_bytes")
    WALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_BYTES_FIELD_NUMBER: _ClassVar[int]
    wall_seconds: float
    cpu_seconds: float
    memory_bytes: int
    output_bytes: int
    def __init__(self, wall_seconds: _Optional[float] = ..., cpu_seconds: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., output_bytes: _Optional[int] = ...) -> None: ...

class File(_message.Message):
    __slots__ = ("name", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content: bytes
    def __init__(self, name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class ExecuteRequest(_message.Message):
    __slots__ = ("request_id", "code", "limits", "result_format", "key", "stdin", "argv", "files", "collect_files", "collect_endings", "session")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    RESULT_FORMAT_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    ARGV_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    COLLECT_FILES_FIELD_NUMBER: _ClassVar[int]
    COLLECT_ENDINGS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    code: str
    limits: Limits
    result_format: ResultFormat
    key: str
    stdin: bytes
    argv: _containers.RepeatedScalarFieldContainer[str]
    files: _containers.RepeatedCompositeFieldContainer[File]
    collect_files: bool
    collect_endings: _containers.RepeatedScalarFieldContainer[str]
    session: str
    def __init__(self, request_id: _Optional[str] = ..., code: _Optional[str] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., result_format: _Optional[_Union[ResultFormat, str]] = ..., key: _Optional[str] = ..., stdin: _Optional[bytes] = ..., argv: _Optional[_Iterable[str]] = ..., files: _Optional[_Iterable[_Union[File, _Mapping]]] = ..., collect_files: bool = ..., collect_endings: _Optional[_Iterable[str]] = ..., session: _Optional[str] = ...) -> None: ...

class ExecutionUsage(_message.Message):
    __slots__ = ("wall_seconds", "cpu_seconds", "peak_memory_bytes")
    WALL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    wall_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    def __init__(self, wall_seconds: _Optional[float] = ..., cpu_seconds: _Optional[float] = ..., peak_memory_bytes: _Optional[int] = ...) -> None: ...

class ExecuteReply(_message.Message):
    __slots__ = ("status", "stdout", "stderr", "result", "error", "truncated", "usage", "profile", "queue_seconds", "files", "files_complete", "session_new")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    STDOUT_FIELD_NUMBER: _ClassVar[int]
    STDERR_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    FILES_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    SESSION_NEW_FIELD_NUMBER: _ClassVar[int]
    status: Status
    stdout: str
    stderr: str
    result: str
    error: str
    truncated: bool
    usage: ExecutionUsage
    profile: str
    queue_seconds: float
    files: _containers.RepeatedCompositeFieldContainer[File]
    files_complete: bool
    session_new: bool
    def __init__(self, status: _Optional[_Union[Status, str]] = ..., stdout: _Optional[str] = ..., stderr: _Optional[str] = ..., result: _Optional[str] = ..., error: _Optional[str] = ..., truncated: bool = ..., usage: _Optional[_Union[ExecutionUsage, _Mapping]] = ..., profile: _Optional[str] = ..., queue_seconds: _Optional[float] = ..., files: _Optional[_Iterable[_Union[File, _Mapping]]] = ..., files_complete: bool = ..., session_new: bool = ...) -> None: ...

class ExecuteEvent(_message.Message):
    __slots__ = ("stdout", "stderr", "reply")
    STDOUT_FIELD_NUMBER: _ClassVar[int]
    STDERR_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    stdout: bytes
    stderr: bytes
    reply: ExecuteReply
    def __init__(self, stdout: _Optional[bytes] = ..., stderr: _Optional[bytes] = ..., reply: _Optional[_Union[ExecuteReply, _Mapping]] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Info(_message.Message):
    __slots__ = ("profile", "concurrency", "default_limits", "maximum_limits")
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    CONCURRENCY_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_LIMITS_FIELD_NUMBER: _ClassVar[int]
    MAXIMUM_LIMITS_FIELD_NUMBER: _ClassVar[int]
    profile: str
    concurrency: int
    default_limits: Limits
    maximum_limits: Limits
    def __init__(self, profile: _Optional[str] = ..., concurrency: _Optional[int] = ..., default_limits: _Optional[_Union[Limits, _Mapping]] = ..., maximum_limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...
