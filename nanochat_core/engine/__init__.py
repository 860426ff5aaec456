"""Inference engine: continuous batching over a paged KV cache. The model can call Python while it writes.

Evaluation and RL call :class:`Engine` directly, one step at a time. The service uses :class:`AsyncEngine`, which
runs an engine on a thread and streams the outputs to asyncio.
"""

from nanochat_core.constraints.constraint import Constraint, ConstraintError, ConstraintKind
from nanochat_core.engine.admission import QueueFull
from nanochat_core.engine.async_engine import AsyncEngine, EngineDead, Stream
from nanochat_core.engine.compilations import CallerLimit
from nanochat_core.engine.config import EngineConfig
from nanochat_core.engine.engine import Engine
from nanochat_core.engine.observer import Load, Observer
from nanochat_core.engine.request import (
    Completion,
    Continuation,
    FinishReason,
    Output,
    Picture,
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
