"""A model that writes a program with matplotlib shows the picture in the page. All services run as by ``make run``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from nanochat_core.checkpoint import CheckpointRef, promote
from nanochat_core.store import open_store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.drawing import SINE, drawing_environment
from tests.support.engine_models import BYTES, scripted_model
from tests.support.stack import Stack

ANSWER = f"<|assistant_start|>Run: <|python_start|>{SINE}<|python_end|><|output_end|>ok<|assistant_end|>"
# The height of the curve, from 0 (bottom) to 1, in each column of the picture that has the color of the curve.
CURVE = """
picture => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0);
  const { data, width, height } = context.getImageData(0, 0, canvas.width, canvas.height);
  const heights = [];
  for (let x = 0; x < width; x++) {
    const rows = [];
    for (let y = 0; y < height; y++) {
      const place = 4 * (y * width + x);
      const [red, green, blue] = [data[place], data[place + 1], data[place + 2]];
      if (red < 60 && Math.abs(green - 119) < 30 && blue > 150) rows.push(y);
    }
    if (rows.length > 0) heights.push(1 - (rows[0] + rows[rows.length - 1]) / 2 / height);
  }
  return heights;
}
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the page. The model answers every question with the same program, which is one of its tokens."""
    environment = drawing_environment()
    home: Path = tmp_path_factory.mktemp("home")
    store, checkpoint = open_store(str(home)), CheckpointRef("painter", "sft", 1)
    tokenizer = Tokenizer([*BYTES.token_bytes, SINE.encode()])
    model = scripted_model(ANSWER, tokenizer=tokenizer, context_length=2048)
    save_checkpoint(store, checkpoint, model=model, tokenizer=tokenizer, meta={})
    promote(store, checkpoint)
    running = Stack(home, MODEL="painter", **environment)
    try:
        yield running.wait_ready()
    finally:
        assert running.stop() == 0, "".join(running.log)


def test_a_sine_wave_is_drawn_and_shown(browser: Browser, url: str, tmp_path: Path) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, reduced_motion="reduce")
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda m: problems.append(m.text) if "Content Security Policy" in m.text else None)
    page.goto(url)
    page.get_by_test_id("composer").fill("Draw a sine wave.")
    page.get_by_test_id("composer").press("Enter")
    answer = page.get_by_test_id("message-assistant")
    expect(answer).to_have_attribute("data-state", "complete")
    card = answer.get_by_test_id("tool-card")
    expect(card).to_have_attribute("data-state", "ok")
    expect(card.get_by_test_id("tool-output")).to_have_text("drawn")
    picture = card.get_by_test_id("tool-picture")
    expect(picture).to_be_visible()
    expect(picture).to_have_js_property("complete", True)
    heights = picture.evaluate(CURVE)
    page.screenshot(path=tmp_path / "drawing.png")
    context.close()
    assert problems == []
    assert len(heights) > 300
    half = len(heights) // 2
    highest, lowest = heights.index(max(heights)), heights.index(min(heights))
    assert highest < half < lowest
    assert heights[0] == pytest.approx(heights[half], abs=0.05) == pytest.approx(heights[-1], abs=0.05)
