"""A figure that code draws in the sandbox service arrives in the gateway's answer."""

import base64
from collections.abc import Iterator

import pytest

from nanochat_core.engine import Output, ToolResult
from nanochat_core.protos import engine_pb2
from services.engine.conversion import chunk
from services.engine.sandbox_client import SandboxClient
from services.gateway.answer.choice_decoder import ChoiceDecoder
from tests.support.drawing import SINE, drawing_flags
from tests.support.engine_models import BYTES
from tests.support.service_process import ServiceProcess


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    service = ServiceProcess("services.sandbox", *drawing_flags())
    yield service.address
    assert service.stop() == 0


async def test_a_sine_wave_is_shown_beside_the_answer(address: str) -> None:
    client = SandboxClient([address])
    try:
        output = await client(SINE, request_id="r", timeout_seconds=60)
        plain = await client("12/60", request_id="r", timeout_seconds=60)
    finally:
        await client.close()
    assert (output.status, output.output) == ("ok", "drawn")
    assert (plain.output, plain.pictures) == ("0.2", ())
    result = ToolResult(0, output.status, output.output, 0.1, output.pictures)
    message = chunk(Output(request_id="r", index=0, tool_events=[result]))
    sent = engine_pb2.GenerateChunk.FromString(message.SerializeToString())
    (event,) = ChoiceDecoder(BYTES).feed(sent).tool_events
    (picture,) = event["pictures"]
    assert (picture["name"], picture["media_type"]) == ("figure-1.png", "image/png")
    assert base64.b64decode(picture["data"]).startswith(b"\x89PNG\r\n\x1a\n")
