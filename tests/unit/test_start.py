"""The checkpoint that ``--start-from`` names: of a model, of a stage or of a step."""

from pathlib import Path

import pytest

from jobs.train.loop.start import find_checkpoint
from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.config import ModelConfig
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.store import FolderStore
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    store = FolderStore(tmp_path)
    tokenizer = Tokenizer([bytes([i]) for i in range(256)])
    model = GPT(ModelConfig.from_depth(1, vocab_size=tokenizer.vocab_size, head_dim=16, context_length=16))
    model.init_weights()
    for stage, step in (("base", 7), ("sft", 4), ("lesson", 1), ("lesson", 2)):
        save_checkpoint(store, CheckpointRef("m", stage, step), model=model, tokenizer=tokenizer, meta={})
    return store


@pytest.mark.parametrize(
    ("text", "revision"),
    [
        ("m", "sft/step_000004"),
        ("m/base", "base/step_000007"),
        ("m/sft", "sft/step_000004"),
        ("m/lesson", "lesson/step_000002"),
        ("m/lesson/step_1", "lesson/step_000001"),
    ],
)
def test_a_stage_means_its_newest_checkpoint_and_a_model_the_first_stage_that_it_has(
    store: FolderStore, text: str, revision: str
) -> None:
    assert find_checkpoint(store, text, "rl", "sft", "base").ref.revision == revision


@pytest.mark.parametrize("text", ["m/rl", "m/what", "other", "other/lesson"])
def test_a_checkpoint_that_is_not_there_is_refused(store: FolderStore, text: str) -> None:
    with pytest.raises(UserError, match=f"--start-from names '{text}', but"):
        find_checkpoint(store, text, "sft", "base")
