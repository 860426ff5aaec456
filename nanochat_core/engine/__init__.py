"""Inference engine: continuous batching over a paged KV cache. The model can call Python while it writes.

Evaluation and RL call :class:`Engine` directly, one step at a time. The service uses :class:`AsyncEngine`, which
runs an engine on a thread and streams the outputs to asyncio.

Terms of this package:

- A request asks for one or several *choices*, that is, completions of its prompt. A *sequence* is the engine's state of
  one choice: the tokens of the prompt and the completion, and their places in the cache.
- A *step* computes one batch. A *chunk* is the part of a sequence that one step computes.
- A *block* stores the keys and values of a fixed number of tokens. A *cache group* is the layers that have the same
  attention window; it has its own blocks.
- A *draft* is a guess of a sequence's next tokens, which one step checks together (speculative decoding).
- A token is *in flight* while the device is still sampling it. A sequence is *parked* while it waits for a Python call.
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
