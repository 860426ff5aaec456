"""An engine without a model, as a process of its own, so that a benchmark measures only the gateway.

``python -m tests.benchmarks.scripted_engine_process`` listens at ``--address`` and prints a line when it is ready.
Every answer has 15 tokens of one letter, ``--pause`` seconds apart. With ``--endless``, the answer to a request for
more than 16 tokens has no end: 1,000 tokens a second, of 64 bytes each.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Any

from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.tokenizer import Tokenizer
from tests.support.scripted_engine import ScriptedEngine, chunk, saying

# The last token is long. An answer of such tokens soon fills the buffers between gateway and client.
TOKENIZER = Tokenizer([bytes([i]) for i in range(256)] + [b"-" * 64])
LONG_TOKENS = chunk([256] * 50)


class Engine(ScriptedEngine):
    """A scripted engine that does not store its requests."""

    def __init__(self, pause: float, endless: bool, **options: Any) -> None:
        super().__init__(tokenizer=TOKENIZER, **options)
        self._short = saying(b"a" * 15, finish=pb.FINISH_REASON_LENGTH, pause=pause)
        self._endless = endless

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        while self._endless and request.sampling.max_tokens > 16:
            yield LONG_TOKENS
            await asyncio.sleep(0.05)
        async for part in self._short(request, context):
            yield part


async def main() -> None:
    """Answers until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", default="127.0.0.1:50051", help="host:port to listen on; port 0 takes a free one")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two tokens")
    parser.add_argument("--endless", action="store_true", help="give endless answers to requests for many tokens")
    parser.add_argument("--context-length", type=int, default=2048)
    flags = parser.parse_args()
    engine = Engine(flags.pause, flags.endless, address=flags.address, context_length=flags.context_length)
    await engine.start()
    print(f"ready {engine.address}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
