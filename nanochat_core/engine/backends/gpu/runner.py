"""Runs steps on a GPU. Steps of few tokens run as CUDA graphs."""

import logging
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from nanochat_core.device import RECORDING, to_device
from nanochat_core.engine.backends.gpu.network import GpuCache, GpuNetwork
from nanochat_core.engine.backends.gpu.step import StepInputs
from nanochat_core.engine.scheduler import Chunk
from nanochat_core.engine.step import LaunchedStep, TokenBatch
from nanochat_core.model import GPT

log = logging.getLogger(__name__)

# Numbers of tokens for which there is a CUDA graph. A step is padded to the next of these sizes. Larger steps need no
# graph: starting the kernels one by one takes less time than running the kernels.
GRAPH_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# In a large step, the last layer computes only the tokens whose logits are needed, if the step has at least this many
# times as many tokens. Otherwise, the last layer computes all tokens, because attention of all tokens in tiles is then
# faster than attention of the needed tokens one by one.
LEAST_TOKENS_PER_ROW = 4

Compute = Callable[[], Tensor]


class GpuRunner:
    """The :class:`~nanochat_core.engine.backends.runner.Runner` that uses the GPU kernels."""

    def __init__(
        self, network: GpuNetwork, cache: GpuCache, token_budget: int, max_running: int, *, graphs: bool = True
    ) -> None:
        """A step has at most ``token_budget`` tokens and ``max_running`` sequences.

        Without ``graphs``, small steps run the same kernels, but the host starts them one by one.
        """
        self._network, self.cache, self._device = network, cache, network.device
        # Include the first size that is at least the token budget, because a full step is padded to that size.
        self.sizes = GRAPH_SIZES[: 1 + sum(size < token_budget for size in GRAPH_SIZES)]
        self.inputs = StepInputs(
            cache,
            tokens=max(token_budget, self.sizes[-1]),
            sequences=max_running,
            tile_rows=network.tile_rows,
            no_token=network.no_token,
        )
        # All graphs write their logits to this tensor, so each run overwrites the previous logits. The graphs share all
        # other memory, in ``_pool``.
        self._logits = torch.empty(self.sizes[-1], network.config.vocab_size, device=self._device)
        self._graphs: dict[int, Compute] = {}
        graphs = graphs and self._device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if graphs else None
        self._stream = torch.cuda.Stream(self._device) if graphs else None

    def load(self, model: GPT) -> None:
        self._network.load(model)

    def warm_up(self) -> None:
        """Record every graph. The largest graph is first, so that the smaller graphs reuse its memory."""
        started = time.perf_counter()
        for size in reversed(self.sizes):
            self._graph(size)
        log.info("recorded CUDA graphs", extra={"graphs": len(self._graphs), "seconds": time.perf_counter() - started})

    @torch.inference_mode()
    def run(self, chunks: Iterable[Chunk], previous: LaunchedStep | None = None) -> tuple[list[Chunk], Tensor]:
        chunks = list(chunks)
        self.cache.copy(chunks)
        batch = TokenBatch(chunks, self._network.no_token)
        count = batch.rows.shape[1]
        size = next((size for size in self.sizes if size >= count), None)
        graph = None if size is None else self._graph(size)
        step = self.inputs.fill(chunks, batch, size or count, in_pieces=size is None)
        batch.fill_in(step.ids, previous)
        rows = batch.logit_rows(chunks)
        with_logits = [chunk for chunk in chunks if chunk.logits]
        if graph is not None:
            return with_logits, self._select(graph()[:count], rows)
        if len(rows) <= count // LEAST_TOKENS_PER_ROW:
            wanted = to_device(np.array(rows, np.int64), self._device)
            return with_logits, self._network.logits(self._network.hidden(step, self.cache, wanted))
        return with_logits, self._network.logits(self._select(self._network.hidden(step, self.cache), rows))

    def _select(self, x: Tensor, rows: Items[int]) -> Tensor:
        return x if len(rows) == len(x) else x.index_select(0, to_device(np.array(rows, np.int64), self._device))

    def _graph(self, size: int) -> Compute:
        """A function that computes the logits of the first ``size`` tokens in ``inputs``."""
        if size not in self._graphs:
            step = self.inputs.fill([], TokenBatch([], self._network.no_token), size, in_pieces=False)

            def compute() -> Tensor:
                return self._network.logits(self._network.hidden(step, self.cache), out=self._logits[:size])

            self._graphs[size] = compute if self._stream is None else self._record(compute, self._stream)
        return self._graphs[size]

    def _record(self, compute: Compute, stream: torch.cuda.Stream) -> Compute:
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            compute()  # compiles kernels and initializes libraries; a graph cannot record such work
        graph = torch.cuda.CUDAGraph()
        # Another thread may still serve requests with the previous model. With the capture mode ``thread_local``, that
        # thread's allocations do not stop the recording.
        with RECORDING, torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            logits = compute()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
