"""The promotion gate with a real store and engine: if it refuses a worse model, the old model is still served."""

import json
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.promotion.decisions import Decision, decisions, last_promotion, was_replaced
from jobs.promotion.gate import PromotedChanged, decide, restore
from jobs.promotion.rules import Gate
from jobs.results.evaluations import Evaluation
from jobs.results.metrics import metrics_of
from nanochat_core.checkpoint import CheckpointRef, load_checkpoint, promote, promoted
from nanochat_core.errors import UserError
from nanochat_core.protos import engine_pb2 as pb
from nanochat_core.store import Store, open_store
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.engine_models import BYTES, tiny_model
from tests.support.service_process import EngineProcess

FIRST, SECOND = CheckpointRef("tiny", "sft", 1), CheckpointRef("tiny", "sft", 2)
GATE = Gate(require=("chat.accuracy>=0.8",))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def trained(store: Store, ref: CheckpointRef, accuracy: float | None, depth: int = 2, **meta: Any) -> None:
    """Save a checkpoint, and a result with this accuracy."""
    save_checkpoint(store, ref, model=tiny_model(depth=depth), tokenizer=BYTES, meta=meta)
    if accuracy is not None:
        evaluation = Evaluation.of(store, load_checkpoint(store, ref), "conversations", {"items": 100})
        evaluation.finish({"accuracy": accuracy, "kinds": {}})


def asked(store: Store, ref: CheckpointRef, gate: Gate = GATE, **options: Any) -> Decision:
    return decide(store, load_checkpoint(store, ref), gate, **{"promoting": True, **options})


def test_a_good_first_model_is_promoted_and_the_decision_kept(store: Store) -> None:
    trained(store, FIRST, 0.9)
    asked(store, FIRST)
    assert promoted(store, "tiny") == FIRST
    assert store.keys("reports") == ["reports/tiny/decisions/sft_step_000001.json"]
    (kept,) = decisions(store, FIRST)
    assert kept.accepted
    assert kept.promoted
    assert kept.metrics["chat.accuracy"].value == 0.9


def test_a_model_that_was_not_measured_is_refused(store: Store) -> None:
    trained(store, FIRST, None)
    decision = asked(store, FIRST)
    assert promoted(store, "tiny") is None
    assert decision.refusals == ["chat.accuracy was not measured; at least 0.8 is required"]


def test_being_asked_alone_promotes_nothing(store: Store) -> None:
    trained(store, FIRST, 0.9)
    assert asked(store, FIRST, promoting=False).accepted
    assert promoted(store, "tiny") is None


def test_every_decision_is_kept_once(store: Store) -> None:
    trained(store, FIRST, 0.7)
    asked(store, FIRST)
    asked(store, FIRST)
    trained(store, FIRST, 0.9)
    asked(store, FIRST)
    assert [decision.accepted for decision in decisions(store, FIRST)] == [False, True]


def test_a_worse_model_than_the_promoted_one_is_refused_though_it_meets_the_threshold(store: Store) -> None:
    trained(store, FIRST, 0.95)
    asked(store, FIRST)
    trained(store, SECOND, 0.9, depth=3)
    decision = asked(store, SECOND)
    assert decision.refusals == ["chat.accuracy is 0.9, the promoted model has 0.95; it may be worse by at most 0.02"]
    assert decision.against == "tiny sft/step_000001"
    assert promoted(store, "tiny") == FIRST
    assert asked(store, SECOND, Gate(no_worse=("chat.accuracy:0.1",))).promoted
    assert promoted(store, "tiny") == SECOND


def test_metrics_of_the_model_that_it_was_made_from_count(store: Store) -> None:
    base = CheckpointRef("other", "base", 5)
    save_checkpoint(store, base, model=tiny_model(depth=3), tokenizer=BYTES, meta={})
    made = load_checkpoint(store, base)
    Evaluation.of(store, made, "core", {}).finish({"core": 0.3, "tasks": {}})
    inputs = {"base": made.digests["model.safetensors"], "conversations": "x"}
    trained(store, FIRST, 0.9, inputs=inputs, base="base/step_000005", base_model="other")
    assert asked(store, FIRST, Gate(require=("core.core>=0.25",))).accepted
    trained(store, SECOND, 0.9, inputs={"base": "0" * 64}, base="base/step_000005", base_model="other")
    assert not asked(store, SECOND, Gate(require=("core.core>=0.25",))).accepted


def test_metrics_of_the_base_model_count_if_a_stage_changed_no_weight(store: Store) -> None:
    base, tuned = CheckpointRef("tiny", "base", 5), CheckpointRef("tiny", "sft", 1)
    save_checkpoint(store, base, model=tiny_model(depth=3), tokenizer=BYTES, meta={})
    Evaluation.of(store, load_checkpoint(store, base), "core", {}).finish({"core": 0.3, "tasks": {}})
    digest = load_checkpoint(store, base).weights_digest
    for ref, parent in ((tuned, base), (CheckpointRef("tiny", "rl", 1), tuned)):
        meta = {"inputs": {parent.stage: digest}, parent.stage: parent.revision}
        save_checkpoint(store, ref, model=tiny_model(depth=3), tokenizer=BYTES, meta=meta)
        assert load_checkpoint(store, ref).weights_digest == digest
        assert metrics_of(store, load_checkpoint(store, ref))["core.core"].value == 0.3


def test_of_several_base_models_only_the_last_one_counts(store: Store) -> None:
    """The second base model was trained from the first one, and may have forgotten what the first one knew."""
    digests: list[str] = []
    for name, depth, core in (("one", 3, 0.3), ("two", 4, 0.1)):
        base = CheckpointRef(name, "base", 5)
        inputs = {"base": digests[-1]} if digests else {}
        meta = {"inputs": inputs, "base": "base/step_000005", "base_model": "one"} if digests else {}
        save_checkpoint(store, base, model=tiny_model(depth=depth), tokenizer=BYTES, meta=meta)
        made = load_checkpoint(store, base)
        digests.append(made.weights_digest)
        Evaluation.of(store, made, "core", {}).finish({"core": core, "tasks": {}})
    trained(store, FIRST, 0.9, inputs={"base": digests[1]}, base="base/step_000005", base_model="two")
    assert asked(store, FIRST).metrics["core.core"].value == 0.1


def test_how_well_its_predecessor_chatted_does_not_count(store: Store) -> None:
    trained(store, FIRST, 0.99)
    digest = load_checkpoint(store, FIRST).digests["model.safetensors"]
    trained(store, SECOND, None, depth=3, inputs={"base": digest}, base="sft/step_000001")
    assert asked(store, SECOND).refusals == ["chat.accuracy was not measured; at least 0.8 is required"]


def test_another_model_can_be_the_measure(store: Store) -> None:
    trained(store, CheckpointRef("old", "sft", 1), 0.95)
    asked(store, CheckpointRef("old", "sft", 1))
    trained(store, FIRST, 0.9, depth=3)
    assert not asked(store, FIRST, Gate(), against="old").accepted
    assert asked(store, FIRST, Gate()).accepted
    with pytest.raises(UserError, match="--against names 'none', which has no promoted checkpoint"):
        asked(store, FIRST, Gate(), against="none")


def test_weights_that_replaced_the_promoted_ones_are_compared_with_what_these_were(store: Store) -> None:
    trained(store, FIRST, 0.95)
    asked(store, FIRST)
    trained(store, FIRST, 0.85, depth=3)
    assert not asked(store, FIRST).accepted
    assert promoted(store, "tiny") is None, "what was promoted is gone, and what is there was refused"
    assert not asked(store, FIRST).accepted, "asking again does not help"
    trained(store, SECOND, 0.9, depth=5)
    assert asked(store, SECOND).against == "tiny sft/step_000001"
    assert promoted(store, "tiny") is None
    trained(store, FIRST, 0.96, depth=4)
    assert asked(store, FIRST).promoted
    assert promoted(store, "tiny") == FIRST


@pytest.fixture
def engine(store: Store, tmp_path: Path) -> Iterator[EngineProcess]:
    trained(store, FIRST, 0.95)
    asked(store, FIRST)
    service = EngineProcess(tmp_path)
    try:
        yield service
        assert service.stop() == 0
    finally:
        service.process.kill()
        service.stop()


def test_a_refused_model_is_never_served_and_a_better_one_is(store: Store, engine: EngineProcess) -> None:
    first = engine.stub.GetModel(pb.GetModelRequest())
    said = engine.tokens([1, 2, 3], sampling={"max_tokens": 8})
    trained(store, SECOND, 0.5, depth=3)
    asked(store, SECOND)
    time.sleep(1.0)  # the engine checks the promotion ten times
    assert engine.stub.GetModel(pb.GetModelRequest()) == first
    assert engine.tokens([1, 2, 3], sampling={"max_tokens": 8}) == said
    trained(store, SECOND, 0.97, depth=4)
    asked(store, SECOND)
    engine.wait_for("model loaded", revision=SECOND.revision)
    assert engine.stub.GetModel(pb.GetModelRequest()).revision == SECOND.revision


def test_the_engine_goes_on_with_what_it_has_when_refused_weights_replaced_the_promoted_ones(
    store: Store, engine: EngineProcess
) -> None:
    first = engine.stub.GetModel(pb.GetModelRequest())
    trained(store, FIRST, 0.5, depth=3)
    asked(store, FIRST)
    engine.wait_for("waiting for a model")
    assert engine.stub.GetModel(pb.GetModelRequest()) == first
    assert engine.tokens([1, 2, 3], sampling={"max_tokens": 4})


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["jobs.eval.gate", *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("jobs.eval.gate", run_name="__main__", alter_sys=True)
    return int(str(ended.value.code))


def test_the_command_says_why_and_its_exit_code_tells_refused_from_wrong(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(store, FIRST, 0.9)
    given = ["--model=tiny", f"--home={tmp_path}"]
    assert exit_code(monkeypatch, *given, "--require=chat.accuracy>=0.95,core.core>=0.2", "--promote") == 3
    output = capsys.readouterr().out
    assert "tiny sft/step_000001: refused" in output
    assert "fails    chat.accuracy is 0.9; at least 0.95 is required" in output
    assert "fails    core.core was not measured; at least 0.2 is required" in output
    assert promoted(store, "tiny") is None
    assert exit_code(monkeypatch, *given, "--require=chat.accuracy>=0.9", "--promote") == 0
    assert promoted(store, "tiny") == FIRST
    assert exit_code(monkeypatch, *given, "--require=chat.accuracy") == 2
    assert exit_code(monkeypatch, *given, "--revision=sft/step_7") == 2
    assert exit_code(monkeypatch, "--model=none", f"--home={tmp_path}") == 2
    assert exit_code(monkeypatch, *given, "--recipe=none") == 2


def test_what_is_promoted_by_hand_without_a_decision_is_compared_with_what_was_measured(store: Store) -> None:
    trained(store, FIRST, 0.95)
    promote(store, FIRST)
    trained(store, SECOND, 0.5, depth=3)
    assert not asked(store, SECOND, Gate()).accepted
    assert promoted(store, "tiny") == FIRST


def test_a_model_replaces_only_the_promoted_one_that_it_was_made_from(store: Store) -> None:
    trained(store, FIRST, 0.9)
    trained(store, SECOND, 0.95, depth=3)
    with pytest.raises(PromotedChanged, match="no revision is promoted now, and no longer sft/step_000001"):
        asked(store, SECOND, expected=FIRST)
    asked(store, FIRST)
    other = CheckpointRef("tiny", "sft", 3)
    with pytest.raises(PromotedChanged, match="sft/step_000001 is promoted now, and no longer sft/step_000003"):
        asked(store, SECOND, expected=other)
    assert (promoted(store, "tiny"), decisions(store, SECOND)) == (FIRST, [])
    for _ in range(2):  # the second time, the model itself is promoted already
        assert asked(store, SECOND, expected=FIRST).promoted
    assert promoted(store, "tiny") == SECOND


def test_the_newest_promotion_is_known_even_if_a_model_was_promoted_again(store: Store) -> None:
    trained(store, FIRST, 0.9)
    trained(store, SECOND, 0.95, depth=3)
    asked(store, FIRST)
    asked(store, SECOND)
    for _ in range(2):
        restore(store, FIRST, load_checkpoint(store, FIRST).weights_digest)
    newest = last_promotion(store, "tiny")
    assert newest is not None
    assert (newest[0], promoted(store, "tiny")) == (FIRST, FIRST)
    assert [len(decisions(store, each)) for each in (FIRST, SECOND)] == [2, 1]
    asked(store, SECOND)
    newest = last_promotion(store, "tiny")
    assert newest is not None
    assert newest[0] == SECOND


def test_a_replaced_promotion_is_known_whatever_the_gate_compared_with(store: Store) -> None:
    trained(store, CheckpointRef("old", "sft", 1), 0.9, depth=4)
    asked(store, CheckpointRef("old", "sft", 1))
    trained(store, FIRST, 0.95)
    trained(store, SECOND, 0.9, depth=3)
    asked(store, FIRST)
    assert not was_replaced(store, FIRST)
    assert asked(store, SECOND, against="old", promoting=False).accepted
    assert not was_replaced(store, FIRST), "nothing was promoted"
    decision = asked(store, SECOND, against="old")
    assert (decision.against, decision.replaced) == ("old sft/step_000001", "tiny sft/step_000001")
    assert [was_replaced(store, each) for each in (FIRST, SECOND)] == [True, False]


def test_a_promotion_that_equal_weights_replaced_is_known(store: Store) -> None:
    for ref in (FIRST, SECOND):
        trained(store, ref, 0.9)
        assert asked(store, ref).against == "", "there is no other model to compare with"
    assert [was_replaced(store, each) for each in (FIRST, SECOND)] == [True, False]


def test_a_promotion_that_never_happened_was_not_replaced(store: Store) -> None:
    trained(store, FIRST, 0.95)
    asked(store, FIRST)
    trained(store, SECOND, 0.96, depth=3)
    asked(store, SECOND)
    promote(store, FIRST)  # as if the process had died between the decision on the second model and its promotion
    trained(store, FIRST, 0.5, depth=4)
    asked(store, FIRST)
    assert promoted(store, "tiny") is None
    third = CheckpointRef("tiny", "sft", 3)
    trained(store, third, 0.97, depth=5)
    assert asked(store, third).against == "tiny sft/step_000002"
    assert [was_replaced(store, each) for each in (FIRST, SECOND)] == [True, False]


def test_a_decision_of_a_version_that_did_not_record_what_it_replaced_is_read(store: Store) -> None:
    trained(store, FIRST, 0.9)
    trained(store, SECOND, 0.95, depth=3)
    asked(store, FIRST)
    asked(store, SECOND)
    key = "reports/tiny/decisions/sft_step_000002.json"
    stored = json.loads(store.read(key))
    assert stored["decisions"][0].pop("replaced") == "tiny sft/step_000001"
    store.write(key, json.dumps(stored).encode())
    assert [each.replaced for each in decisions(store, SECOND)] == [None]
    assert was_replaced(store, FIRST)
