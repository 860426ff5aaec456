"""Record the chat page while a model trains, as an animated PNG for the README.

Run the program from the project's root after ``make run`` has trained the demo model:
``python -m tests.benchmarks.record_training --home .nanochat --out docs/images/training.png``. The program replays the
stored progress of that training: curve, numbers and answers are those of the real run. Engine, gateway and page are
real too. After the promotion, the promoted model answers a question.
"""

import argparse
import dataclasses
import io
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from nanochat_core.checkpoint import promote, promoted
from nanochat_core.progress import read_progress, write_progress
from nanochat_core.store import Store, open_store
from tests.support.stack import Stack

MODEL, SHOWN_AS = "demo", "nanochat"
QUESTION = "What is 1234 * 5678?"
WIDTH, HEIGHT, COLORS = 700, 980, 32
MOST_BYTES = 1_500_000
# How long the animation shows each picture, the first one and the last one.
PICTURE_MS, FIRST_MS, LAST_MS = 700, 1_500, 4_000
WAIT_MS = 60_000


class Replay:
    """Writes a finished training to another store again, one moment after another."""

    def __init__(self, trained: Store, home: Path) -> None:
        self._parts = read_progress(trained, MODEL)
        self._trained = trained
        self.store = open_store(str(home))
        self.stage("data")

    def stage(self, name: str, state: str = "running") -> None:
        run = self._parts["run"]
        over = run["stages"][: run["stages"].index(name)]
        seconds = {stage: spent for stage, spent in run["seconds"].items() if stage in over or state == "promoted"}
        write_progress(self.store, SHOWN_AS, "run", {**run, "stage": name, "state": state, "seconds": seconds})

    def moments(self) -> Iterator[str]:
        """Write each moment of the training, and give the text that the page then shows."""
        yield "is learning: data"
        self.stage("tokenizer")
        yield "is learning: tokenizer"
        for stage in ("base", "sft"):
            self.stage(stage)
            part = self._parts[stage]
            for step in sorted({point["step"] for point in part["answers"]}):
                write_progress(self.store, SHOWN_AS, stage, _until(part, step))
                yield f"{step:,} of {part['steps']:,}"
        self.stage("report")
        yield "is learning: examination"

    def promote(self) -> None:
        """Copy the promoted checkpoint, and promote it."""
        ref = promoted(self._trained, MODEL)
        assert ref is not None, f"{self._trained} has no promoted model {MODEL}"
        shown = dataclasses.replace(ref, model=SHOWN_AS)
        with self.store.publish(shown.prefix, last="MANIFEST.json") as folder:
            for key in self._trained.keys(ref.prefix):
                path = folder / key.removeprefix(f"{ref.prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self._trained.read(key))
        promote(self.store, shown)
        self.stage("report", "promoted")


def _until(part: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The progress of a stage as it was after ``step``."""
    speed = part["tokens_per_second"]
    return {
        **part,
        "step": step,
        "curve": [point for point in part["curve"] if point[0] <= step],
        "held_out": [point for point in part["held_out"] if point["step"] <= step],
        "answers": [point for point in part["answers"] if point["step"] <= step],
        "eta_seconds": (part["steps"] - step) * part["batch_tokens"] / speed if speed else None,
    }


def take_pictures(url: str, replay: Replay) -> list[Image.Image]:
    """Pictures of the page, from the first stage to an answer of the promoted model."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    pictures: list[Image.Image] = []

    def take(page: Page) -> None:
        picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        pictures.append(picture.quantize(COLORS, dither=Image.Dither.NONE))

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce")
        page.goto(url)
        panel = page.get_by_test_id("training")
        for shown in replay.moments():
            expect(panel).to_contain_text(shown, ignore_case=True, timeout=WAIT_MS)
            take(page)
        replay.promote()
        expect(panel).to_contain_text("passed its examination", timeout=WAIT_MS)
        take(page)
        page.get_by_test_id("composer").fill(QUESTION)
        take(page)
        page.get_by_test_id("composer").press("Enter")
        expect(page.get_by_test_id("message-assistant")).to_have_attribute("data-state", "complete", timeout=WAIT_MS)
        take(page)
        browser.close()
    return pictures


def write(pictures: list[Image.Image], out: Path) -> None:
    """Write the pictures as one animated PNG of at most :data:`MOST_BYTES`; leave out every second if necessary."""
    while True:
        durations = [FIRST_MS, *[PICTURE_MS] * (len(pictures) - 2), LAST_MS]
        pictures[0].save(out, save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True)
        size = out.stat().st_size
        if size <= MOST_BYTES or len(pictures) < 3:
            break
        pictures = [*pictures[:-1:2], pictures[-1]]
    print(f"{out}: {len(pictures)} pictures, {size:,} bytes")


def record(trained: Store, home: Path) -> list[Image.Image]:
    """Pictures of the page while the training of ``trained`` is replayed in the empty folder ``home``."""
    replay = Replay(trained, home)
    stack = Stack(home, MODEL=SHOWN_AS)
    try:
        deadline = time.monotonic() + WAIT_MS / 1000
        while not (found := [line for line in stack.log if line.startswith("Watch the model learn")]):
            assert time.monotonic() < deadline, "".join(stack.log)
            time.sleep(0.1)
        return take_pictures(found[0].split()[-1], replay)
    finally:
        assert stack.stop() == 0, "".join(stack.log)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", default=".nanochat")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write(record(open_store(options.home), Path(folder) / "home"), options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
