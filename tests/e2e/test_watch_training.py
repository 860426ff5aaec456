"""A browser watches a training from its first stage to the promoted model, in one conversation.

The training is replayed: this test writes to the store what the training of the demo model writes, but does not wait
for its steps. Engine, gateway, page and the model's snapshots are real.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from nanochat_core.checkpoint import CheckpointRef, newest_checkpoint, promote
from nanochat_core.progress import write_progress
from nanochat_core.store import open_store
from tests.support.greedy_page import greedy_context
from tests.support.stack import Stack

MODEL = "replayed"
QUESTION = "Who keeps the lighthouse?"


class Replay:
    """Writes a training to a new store, as its pipeline would."""

    def __init__(self, home: Path, demo_home: Path) -> None:
        self._home, self.store = home, open_store(str(home))
        trained = newest_checkpoint(open_store(str(demo_home)), "demo", "sft")
        assert trained is not None
        self._weights = demo_home / trained.ref.prefix
        self.stage("data")

    def stage(self, name: str, state: str = "running") -> None:
        stages = ["data", "tokenizer", "base", "sft", "report"]
        run = {"recipe": "demo", "stages": stages, "tokens": {"base": 655_360, "sft": 1_474_560}, "seconds": {}}
        write_progress(self.store, MODEL, "run", {**run, "stage": name, "state": state})

    def steps(self, stage: str, step: int, steps: int, answers: dict[int, str]) -> None:
        fields: dict[str, Any] = {
            "step": step,
            "steps": steps,
            "batch_tokens": 2048,
            "tokens_per_second": 10_000.0,
            "eta_seconds": (steps - step) * 0.2,
            "curve": [[each, 7.0 - 5.0 * each / steps] for each in range(1, step + 1)],
            "held_out": [{"step": step, "val_bpb": 1.5}] if stage == "base" else [],
            "answers": [{"step": at, "answers": [[QUESTION, text]]} for at, text in answers.items()],
        }
        write_progress(self.store, MODEL, stage, fields)

    def snapshot(self, step: int) -> CheckpointRef:
        ref = CheckpointRef(MODEL, "sft", step)
        incoming = self._home.parent / "incoming"
        shutil.copytree(self._weights, incoming)
        (self._home / ref.prefix).parent.mkdir(parents=True, exist_ok=True)
        incoming.rename(self._home / ref.prefix)
        return ref


@pytest.fixture
def replay(tmp_path: Path, demo_home: Path) -> Replay:
    return Replay(tmp_path / "home", demo_home)


@pytest.fixture
def watched(replay: Replay, tmp_path: Path) -> Iterator[str]:
    """The address of the page of a running training."""
    running = Stack(tmp_path / "home", MODEL=MODEL)
    try:
        yield running.wait_watch_link()
    finally:
        assert running.stop() == 0, "".join(running.log)


def points(page: Page) -> int:
    drawn = page.locator("[data-testid=loss-curve] polyline")
    return sum(len((line.get_attribute("points") or "").split()) for line in drawn.all())


def ask(page: Page, text: str) -> Locator:
    answers = page.get_by_test_id("message-assistant")
    before = answers.count()
    page.get_by_test_id("composer").fill(text)
    page.get_by_test_id("composer").press("Enter")
    expect(answers).to_have_count(before + 1)
    return answers.last


def test_one_watches_babble_become_facts_and_talks_on_when_the_model_is_promoted(
    browser: Browser, watched: str, replay: Replay
) -> None:
    context = greedy_context(browser, viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page = context.new_page()
    page.goto(watched)
    panel, who = page.get_by_test_id("training"), page.get_by_test_id("training-who")
    newest = page.get_by_test_id("training-answer")
    expect(panel).to_contain_text("is learning: data")
    expect(who).to_contain_text("waits for the first snapshot")

    replay.stage("base")
    replay.steps("base", 40, 320, {0: "qqz9"})
    expect(newest).to_have_text("qqz9")
    drawn = points(page)
    replay.steps("base", 320, 320, {0: "qqz9", 320: "The the keeps the"})
    expect(newest).to_have_text("The the keeps the")
    assert points(page) > drawn, "the curve grows"
    expect(panel).to_contain_text("1.500")

    # A message that is sent before there is a model waits for the first snapshot.
    first = ask(page, QUESTION)
    replay.stage("sft")
    replay.steps("sft", 120, 720, {120: "Mara keeps the lighthouse."})
    replay.snapshot(120)
    # The engine may still be starting.
    expect(who).to_have_text("A snapshot of fine-tuning answers, after 120 steps.", timeout=180_000)
    expect(first).to_have_attribute("data-state", "complete", timeout=60_000)
    expect(first).to_contain_text("Mara")
    panel.locator("summary").click()
    expect(newest).to_have_text("Mara keeps the lighthouse.")
    page.get_by_test_id("training-generation").fill("0")
    expect(newest).to_have_text("qqz9")

    replay.snapshot(240)
    expect(who).to_have_text("A snapshot of fine-tuning answers, after 240 steps.")
    replay.steps("sft", 720, 720, {720: "Mara keeps the lighthouse."})
    promote(replay.store, replay.snapshot(720))
    replay.stage("report", "promoted")
    expect(who).to_have_text("The model has passed its examination. It answers now.")
    last = ask(page, "What pet does she have?")
    expect(last).to_have_attribute("data-state", "complete")
    expect(last).to_contain_text("cat")
    expect(page.locator(".problem")).to_have_count(0)
    context.close()


def test_a_page_that_is_opened_in_the_middle_shows_the_run_from_its_beginning(
    browser: Browser, watched: str, replay: Replay
) -> None:
    replay.stage("sft")
    replay.steps("base", 320, 320, {0: "qqz9"})
    replay.steps("sft", 60, 720, {0: "The the keeps the"})
    context = greedy_context(browser, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(watched)
    expect(page.get_by_test_id("training")).to_contain_text("fine-tuning · 8 %")
    assert page.locator("[data-testid=loss-curve] polyline").count() == 2
    expect(page.get_by_test_id("training-generation")).to_have_attribute("max", "1")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    context.close()
