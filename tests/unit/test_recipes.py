"""Every recipe fits the programs it configures, generates its data, and refuses data that it does not need."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import recipes
from jobs.data.local_text import LocalText
from jobs.data.shards import TextDataset
from jobs.demo_world.conversations import CONVERSATION_MIX
from jobs.demo_world.evaluation import EVALUATION_MIX
from jobs.recipes import RECIPES, Recipe, cut_documents, flag_arguments
from jobs.train.batches.mixtures import Mixture
from jobs.train.pretrain import PretrainSettings, plan_run
from jobs.train.rl import RlSettings
from jobs.train.sft import SftSettings
from jobs.train.tokenizer import TokenizerSettings
from nanochat_core.errors import UserError
from nanochat_core.settings import load
from nanochat_core.store import Store, open_store

JOBS = {"tokenizer": TokenizerSettings, "pretrain": PretrainSettings, "sft": SftSettings, "rl": RlSettings}
FLAGS = [(recipe, stage) for recipe in RECIPES.values() for stage in JOBS if getattr(recipe, stage) is not None]
REQUIRED = {
    "tokenizer": ["--dataset=d", "--name=t"],
    "pretrain": ["--model=m", "--dataset=d", "--tokenizer=t"],
    "sft": ["--model=m", "--mixture=c"],
    "rl": ["--model=m"],
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def settings(recipe: Recipe, stage: str) -> Any:
    argv = REQUIRED[stage] + flag_arguments(getattr(recipe, stage))
    return load(JOBS[stage], prefix="NANOCHAT_TEST", program="test", argv=argv, environ={})


@pytest.mark.parametrize(("recipe", "stage"), FLAGS, ids=lambda value: getattr(value, "name", value))
def test_the_flags_of_every_stage_are_flags_of_its_job(recipe: Any, stage: Any) -> None:
    settings(recipe, stage)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_batches_are_whole_rows_and_the_rates_change_over_the_run(recipe: Any) -> None:
    tokenizer, pretrain, sft = (settings(recipe, stage) for stage in ("tokenizer", "pretrain", "sft"))
    config, planned = plan_run(pretrain, tokenizer.vocab_size)
    batch_tokens = sft.batch_tokens or planned.batch_tokens  # fine-tuning inherits the batch size of pretraining
    assert batch_tokens % config.context_length == 0
    assert planned.batch_tokens % (pretrain.row_tokens or config.context_length) == 0
    assert pretrain.warmup_steps < planned.steps


def test_both_training_stages_of_the_small_recipe_use_the_same_compiled_code() -> None:
    pretrain, sft = (settings(RECIPES["small"], stage) for stage in ("pretrain", "sft"))
    config, planned = plan_run(pretrain, settings(RECIPES["small"], "tokenizer").vocab_size)
    assert sft.context_length is None
    # torch compiles a kind of block once for each shape of the rows, so no micro-batch may be smaller than another one.
    rows = pretrain.device_batch_rows
    assert rows == sft.device_batch_rows
    assert all(tokens % (rows * config.context_length) == 0 for tokens in (planned.batch_tokens, sft.batch_tokens))
    assert len(set(config.windows)) == 1


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda recipe: recipe.name)
def test_what_is_evaluated_was_taught(recipe: Any) -> None:
    kinds = recipe.conversation_kinds
    if kinds is None:
        assert set(EVALUATION_MIX) <= set(CONVERSATION_MIX)
    else:
        assert kinds <= set(CONVERSATION_MIX)
        assert kinds & set(EVALUATION_MIX)


def quick(name: str, **changes: Any) -> Recipe:
    return dataclasses.replace(RECIPES[name], train_conversations=40, **changes)


def test_the_demo_makes_its_own_text_and_conversations(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "DEMO_DOCUMENTS", 60)
    monkeypatch.setattr(recipes, "DEMO_VALIDATION_DOCUMENTS", 20)
    quick("demo").prepare(store, "demo", None)
    training, validation = (list(TextDataset(store, "demo", split)) for split in ("train", "val"))
    assert (len(training), len(validation)) == (60, 20)
    assert training[:20] != validation
    mixture = Mixture(store, "demo-chat")
    assert (len(mixture.training), len(mixture.validation)) == (40, 256)


def test_your_own_text_is_cut_into_pieces_for_training_and_left_whole_for_validation(
    store: Store, tmp_path: Path
) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"Sentence number {i} of a long book." for i in range(1500)))
    recipe = quick("small", document_characters=300)
    recipe.prepare(store, "mine", LocalText(file))
    training, validation = (list(TextDataset(store, "mine", split)) for split in ("train", "val"))
    assert all(len(document) <= 300 for document in training)
    assert len(validation) == 1
    assert len(validation[0]) > 300
    kinds = {json.loads(line)["kind"] for line in store.read("data/mine-chat/train.jsonl").splitlines()}
    assert kinds <= recipe.conversation_kinds


def test_what_is_there_is_not_made_again(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join("A paragraph. " * 400 for _ in range(5)))
    quick("small").prepare(store, "mine", LocalText(file))
    before = {path: path.stat().st_mtime_ns for path in store.root.rglob("*")}
    monkeypatch.setattr(LocalText, "documents", None)
    quick("small").prepare(store, "mine", LocalText(file))
    quick("small").prepare(store, "mine", None)
    assert {path: path.stat().st_mtime_ns for path in store.root.rglob("*")} == before


@pytest.mark.parametrize(
    ("recipe", "data", "complaint"),
    [("demo", LocalText(Path("book.txt")), "makes its own data"), ("small", None, "needs text: give --data")],
)
def test_data_where_none_is_needed_and_none_where_it_is(store: Store, recipe: str, data: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        quick(recipe).prepare(store, "x", data)
    assert store.keys("data") == []


@pytest.mark.parametrize("text_bytes", [1, 5_000, 40_000, 121_000, 10**6])
def test_a_short_text_is_not_shown_too_often(text_bytes: int, caplog: pytest.LogCaptureFixture) -> None:
    usual = RECIPES["small"]
    fitted = usual.fitted(text_bytes)
    if text_bytes == 10**6:
        assert fitted == usual
        assert not caplog.records
        return
    (warning,) = caplog.records
    chosen = settings(fitted, "pretrain")
    assert (warning.steps, warning.batch_tokens) == (chosen.steps, chosen.batch_tokens)
    assert chosen.batch_tokens % (chosen.device_batch_rows * chosen.context_length) == 0
    assert 0 < chosen.warmup_steps < chosen.steps
    passes = chosen.steps * chosen.batch_tokens * recipes.BYTES_PER_TOKEN / text_bytes
    fewest = chosen.steps == recipes.FEWEST_STEPS and chosen.batch_tokens == recipes.SMALLEST_BATCH
    assert passes <= recipes.MOST_PASSES or fewest


@pytest.mark.parametrize("recipe", ["demo", "speedrun"])
def test_other_recipes_do_not_depend_on_the_length_of_the_text(recipe: str) -> None:
    assert RECIPES[recipe].fitted(5_000) == RECIPES[recipe]


words = st.text(alphabet="ab. !?\n”", max_size=200)


@given(documents=st.lists(words, max_size=4), characters=st.integers(1, 60))
def test_cutting_documents_loses_nothing_but_space(documents: Any, characters: Any) -> None:
    pieces = list(cut_documents(documents, characters))
    assert "".join("".join(pieces).split()) == "".join("".join(documents).split())
    assert all(0 < len(piece) <= characters for piece in pieces)
    assert all(piece == piece.strip() for piece in pieces)


def test_documents_are_cut_after_the_last_sentence_line_or_word_that_fits() -> None:
    text = "The first one. The second one is longer. The third."
    assert list(cut_documents([text], 42)) == ["The first one. The second one is longer.", "The third."]
    assert list(cut_documents(["a line\nanother one"], 15)) == ["a line\nanother", "one"]
    assert list(cut_documents(["one long line\nand another"], 15)) == ["one long line", "and another"]
    assert list(cut_documents(["no sentence ends in here at all"], 10)) == [
        "no sentenc",
        "e ends in",
        "here at",
        "all",
    ]


def test_cut_documents_come_in_order() -> None:
    pieces = list(cut_documents((f"{i}. " * 30 for i in range(20)), 25))
    numbers = [int(piece.split(".")[0]) for piece in pieces]
    assert all(a <= b for a, b in itertools.pairwise(numbers))
