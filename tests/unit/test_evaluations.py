"""An interrupted evaluation keeps its finished parts. Results of different checkpoints or settings are never mixed."""

import json
from pathlib import Path

import pytest

from jobs.results.evaluations import Evaluation, results, results_of
from nanochat_core.checkpoint import CheckpointRef
from nanochat_core.store import FolderStore

REF = CheckpointRef("m", "sft", 10)


def _evaluation(root: Path, digest: str = "a", **settings: int) -> Evaluation:
    return Evaluation(FolderStore(root), REF, digest, "chat", settings)


def test_finished_parts_are_found_by_a_later_run_until_the_result_is_there(tmp_path: Path) -> None:
    _evaluation(tmp_path, items=3).save_part("gsm8k-0", [1, 0])
    later = _evaluation(tmp_path, items=3)
    assert later.part("gsm8k-0") == [1, 0]
    assert later.part("gsm8k-1") is None
    assert later.result() is None
    later.finish({"score": 0.5})
    assert later.part("gsm8k-0") is None
    result = _evaluation(tmp_path, items=3).result()
    assert result is not None
    assert result["score"] == 0.5


def test_other_weights_or_settings_find_neither_parts_nor_result(tmp_path: Path) -> None:
    first = _evaluation(tmp_path, items=3)
    first.save_part("x", 1)
    assert _evaluation(tmp_path, items=4).part("x") is None
    assert _evaluation(tmp_path, "b", items=3).part("x") is None
    first.finish({"score": 1})
    assert _evaluation(tmp_path, items=4).result() is None
    assert _evaluation(tmp_path, "b", items=3).result() is None


def test_results_lists_what_was_finished(tmp_path: Path) -> None:
    _evaluation(tmp_path, items=3).finish({"score": 0.5})
    Evaluation(FolderStore(tmp_path), CheckpointRef("m", "base", 5), "c", "core", {}).finish({"core": 0.1})
    Evaluation(FolderStore(tmp_path), CheckpointRef("m", "base", 5), "c", "unfinished", {}).save_part("a", 1)
    found = {(result["revision"], result["evaluation"]) for result in results(FolderStore(tmp_path), "m")}
    assert found == {("sft/step_000010", "chat"), ("base/step_000005", "core")}


def test_results_with_different_keys_stand_side_by_side(tmp_path: Path) -> None:
    first, second = (Evaluation(FolderStore(tmp_path), REF, "a", "chat", {"task": key}, key) for key in ("x", "y"))
    second.save_part("y-0", [1])
    first.finish({"score": 0.5})
    assert second.part("y-0") == [1], "parts of another key stay"
    second.finish({"score": 0.75})
    assert [result["score"] for result in results_of(FolderStore(tmp_path), REF, "a")] == [0.5, 0.75]
    assert results_of(FolderStore(tmp_path), REF, "b") == [], "results of other weights do not count"


def test_a_result_of_another_version_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = _evaluation(tmp_path, items=3)
    old = evaluation.finish({"score": 0.5})
    del old["format"]
    evaluation.store.write(f"{evaluation.folder}/result.json", json.dumps(old).encode())
    assert list(results(evaluation.store, "m")) == []
    assert "evaluate again" in caplog.text
