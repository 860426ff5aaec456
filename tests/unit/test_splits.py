"""The names of files state their splits. If the names do not decide the use of a file, an error asks what to do."""

from typing import Any

import pytest

from jobs.data.splits import split_files, split_of
from nanochat_core.errors import UserError


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("data/train-00000-of-00002.parquet", "train"),
        ("en/c4-train.00000-of-01024.json.gz", "train"),
        ("TinyStoriesV2-GPT4-valid.txt", "validation"),
        ("val.jsonl.zst", "validation"),
        ("DEV.TXT", "validation"),
        ("validation/00.parquet", "validation"),
        ("data/test_sft-00000-of-00001.parquet", "test"),
        ("train_test_split/train.jsonl", "train"),
        ("train/train_and_test.jsonl", "train"),
        ("test1.csv", "test"),
        ("books/moby.txt", ""),
        ("training.md", ""),
        ("evaluation.md", ""),
        ("trainspotting.txt", ""),
        ("latest.txt", ""),
        ("contest.txt", ""),
        ("préval.txt", ""),
        ("train_test.jsonl", "several splits"),
        ("test/train.jsonl", "several splits"),
    ],
)
def test_a_name_states_a_split_by_a_whole_word(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("names", "training", "validation", "unused"),
    [
        (["test.jsonl", "train.jsonl"], ["train.jsonl"], ["test.jsonl"], []),
        (["test.txt", "train.txt", "val.txt"], ["train.txt"], ["val.txt"], ["test.txt"]),
        (["a.txt", "b.txt", "valid.txt"], ["a.txt", "b.txt"], ["valid.txt"], []),
        (["a.txt", "test.txt"], ["a.txt"], ["test.txt"], []),
        (["train-0.parquet", "train-1.parquet"], ["train-0.parquet", "train-1.parquet"], [], []),
        (["a.txt", "b.txt"], ["a.txt", "b.txt"], [], []),
        (
            ["test.jsonl.zst", "train/00.jsonl.zst", "train/01.jsonl.zst", "val.jsonl.zst"],
            ["train/00.jsonl.zst", "train/01.jsonl.zst"],
            ["val.jsonl.zst"],
            ["test.jsonl.zst"],
        ),
    ],
)
def test_files_are_divided_by_their_splits(names: Any, training: Any, validation: Any, unused: Any) -> None:
    splits = split_files(names, "the folder", "say which")
    assert (splits.training, splits.validation, splits.unused) == (training, validation, unused)


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (
            ["extra.jsonl", "train.jsonl"],
            "the name train.jsonl in F states the split train, but extra.jsonl states none",
        ),
        (
            ["test-0.parquet", "test-1.parquet"],
            "the name test-0.parquet in F states a split, and no file is for training",
        ),
        (["a.txt", "test/train.txt"], "the name test/train.txt in F states several splits"),
    ],
)
def test_an_open_question_is_asked(names: Any, complaint: str) -> None:
    with pytest.raises(UserError) as raised:
        split_files(names, "F", "say which")
    assert str(raised.value) == f"{complaint}; say which"
