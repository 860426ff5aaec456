"""Inference: continuous batching over a paged KV cache, with Python calls in the middle of a sentence.

:class:`Engine` does the work one step at a time and serves evaluation and RL in process; :class:`AsyncEngine` runs it
on a thread of its own and streams to asyncio, for the service.
"""

from nanochat_core.engine.async_engine import AsyncEngine, EngineDead, Stream
from nanochat_core.engine.config import EngineConfig
from nanochat_core.engine.constraints import ConstraintError
from nanochat_core.engine.engine import Engine, Load, Observer, QueueFull
from nanochat_core.engine.request import (
    Completion,
    Constraint,
    ConstraintKind,
    FinishReason,
    Output,
    Request,
    SamplingParams,
    Token,
    ToolCall,
    ToolPolicy,
    ToolResult,
    Usage,
)
from nanochat_core.engine.shedding import Shed
from nanochat_core.engine.tools import ToolOutput, ToolRunner

__all__ = [
    "AsyncEngine",
    "Completion",
    "Constraint",
    "ConstraintError",
    "ConstraintKind",
    "Engine",
    "EngineConfig",
    "EngineDead",
    "FinishReason",
    "Load",
    "Observer",
    "Output",
    "QueueFull",
    "Request",
    "SamplingParams",
    "Shed",
    "Stream",
    "Token",
    "ToolCall",
    "ToolOutput",
    "ToolPolicy",
    "ToolResult",
    "ToolRunner",
    "Usage",
]
