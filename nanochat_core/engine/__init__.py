"""Inference: continuous batching over a paged KV cache, with Python calls in the middle of a sentence.

:class:`Engine` computes one step at a time; evaluation and RL use it in process. :class:`AsyncEngine` runs an engine on
a thread and streams its outputs to asyncio; the service uses it.
"""

from nanochat_core.engine.admission import QueueFull
from nanochat_core.engine.async_engine import AsyncEngine, EngineDead, Stream
from nanochat_core.engine.config import EngineConfig
from nanochat_core.engine.constraints import ConstraintError
from nanochat_core.engine.engine import Engine
from nanochat_core.engine.observer import Load, Observer
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
