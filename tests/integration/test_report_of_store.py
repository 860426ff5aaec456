"""Reports and comparisons work for models in a store, whatever stages have run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.eval import compare
from jobs.eval.checkpoints import newest_stages
from jobs.eval.compare import CompareSettings
from jobs.eval.report import ReportSettings, run
from jobs.eval.report_card import held_out
from jobs.promotion.decisions import decisions
from jobs.promotion.gate import decide
from jobs.promotion.rules import Gate
from jobs.results.evaluations import Evaluation, results
from jobs.results.reports import is_reported
from nanochat_core.checkpoint import Checkpoint, CheckpointRef, load_checkpoint, newest_checkpoint
from nanochat_core.config import ModelConfig
from nanochat_core.device import choose_device, choose_dtype
from nanochat_core.errors import UserError
from nanochat_core.model import GPT
from nanochat_core.store import Store, open_store
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.checkpoint_writer import save_checkpoint
from tests.support.report_dicts import task
from tests.support.tiny_training import NAME, fill

ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
LOSSES = [{"step": i, "loss": 3.0 / i, "train_seconds": float(i)} for i in range(1, 5)]
HISTORIES: dict[str, list[dict[str, Any]]] = {
    "base": [*LOSSES[:-1], LOSSES[-1] | {"val_bpb": 2.0}],
    "sft": [*LOSSES[:-1], LOSSES[-1] | {"val_loss": 0.5}],
    "rl": [
        {"step": 1, "reward": 0.3},
        {"step": 2, "reward": 0.5, "heldout_reward": 0.4, "pass_at_k": {"1": 0.4, "2": 0.5}},
        {"step": 3, "heldout_reward": 0.9, "pass_at_k": {"1": 0.9, "2": 1.0}},
    ],
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("filled") / "home"
    fill(home)
    return home


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Store:
    shutil.copytree(filled, tmp_path / "home")
    return open_store(str(tmp_path / "home"))


def add(store: Store, stage: str, model: str = NAME, depth: int = 1, **meta: Any) -> Checkpoint:
    """Save a checkpoint of random weights with the metadata of a training run."""
    tokenizer = Tokenizer.from_json(store.read(f"tokenizers/{NAME}/tokenizer.json"))
    config = ModelConfig.from_depth(depth, vocab_size=tokenizer.vocab_size, head_dim=16, context_length=256)
    network = GPT(config)
    network.init_weights()
    ref = CheckpointRef(model, stage, 4)
    whole = {
        "settings": {"dataset": NAME, "tokenizer": NAME, "seed": 1},
        "plan": {"steps": 4, "batch_tokens": 64},
        "train_seconds": 4.0,
        "flops_per_token": 1000,
        "history": HISTORIES.get(stage, []),
        "skipped_steps": [],
        **meta,
    }
    save_checkpoint(store, ref, model=network, tokenizer=tokenizer, meta=whole)
    return load_checkpoint(store, ref)


def report_on(store: Store, model: str = NAME, **settings: Any) -> tuple[dict[str, Any], str]:
    given = {"items": 7, "text_bytes": 500, "samples": 1, "threads": 1}
    report = run(ReportSettings(model=model, home=str(store), **(given | settings)))
    return report, store.read(f"reports/{model}/report.md").decode()


@pytest.mark.parametrize("stages", [["base"], ["base", "sft"], ["base", "sft", "rl"], ["sft"], ["sft", "rl"]])
def test_any_stages_make_a_report_with_their_plots(store: Store, stages: list[str]) -> None:
    for stage in stages:
        add(store, stage)
    report, text = report_on(store, recipe="demo")
    assert [stage for stage in ("base", "sft", "rl") if stage in report] == stages
    assert ("chat" in report) == (stages != ["base"])
    assert "held_out_bits_per_byte" in report["base"] if "base" in stages else True
    names = {"loss.png", "report.json", "report.md"}
    names |= {"conversations.png"} if stages != ["base"] else set()
    names |= {"rl.png"} if "rl" in stages else set()
    assert {key.rpartition("/")[2] for key in store.keys(f"reports/{NAME}")} == names
    assert ("| reward on held-out problems | 0.400 | 0.900 |" in text) == ("rl" in stages)
    stored = json.loads(store.read(f"reports/{NAME}/report.json"))
    assert sorted(stored.pop("plots")) == sorted(name for name in names if name.endswith(".png"))
    assert stored == {"format": 1, **json.loads(json.dumps(report))}


def test_a_model_about_which_nothing_is_known_has_a_report(store: Store) -> None:
    checkpoint = add(store, "sft")
    save_checkpoint(
        store, CheckpointRef("bare", "sft", 1), model=checkpoint.build_model(), tokenizer=checkpoint.tokenizer, meta={}
    )
    report, text = report_on(store, "bare")
    assert "chat" not in report, "which conversations to ask is not known"
    assert "loss.png" not in text
    assert "| fine-tuning | `sft/step_000001` | 1 | — | — | — | — | — | — | — |" in text


def test_an_empty_history_is_no_error(store: Store) -> None:
    add(store, "base", history=[])
    _, text = report_on(store)
    assert "loss.png" not in text


def test_a_model_without_its_text_is_reported_without_bits_per_byte(store: Store) -> None:
    add(store, "base")
    store.delete(f"data/{NAME}")
    report, text = report_on(store)
    assert "held_out_bits_per_byte" not in report["base"]
    assert "no longer has the text" in text


def test_a_model_that_is_not_there_is_an_error(store: Store) -> None:
    with pytest.raises(UserError, match="model 'none' has no base or sft or rl checkpoint"):
        report_on(store, "none")


def forbid_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, each held-out evaluation that is made is an error."""

    def again(*_args: Any, **_options: Any) -> None:
        raise AssertionError("measured again")

    for name in ("bits_per_byte", "answer_greedily", "continue_text"):
        monkeypatch.setattr(held_out, name, again)


def test_nothing_is_measured_twice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    add(store, "base")
    add(store, "sft")
    first = report_on(store, recipe="demo")
    forbid_measuring(monkeypatch)
    assert report_on(store, recipe="demo") == first
    with pytest.raises(AssertionError, match="measured again"):
        report_on(store, recipe="demo", items=14)


@pytest.mark.parametrize(
    ("device", "dtype", "computed"),
    [
        ("auto", "auto", None),
        ("cpu", "fp32", ("cpu", torch.float32)),
        ("cpu", "bf16", ("cpu", torch.bfloat16)),
        pytest.param("cuda", "fp32", ("cuda", torch.float32), marks=ON_GPU),
        pytest.param("auto", "bf16", ("cuda", torch.bfloat16), marks=ON_GPU),
    ],
)
def test_the_held_out_evaluations_compute_on_the_device_and_in_the_dtype_that_are_given(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: str,
    computed: tuple[str, torch.dtype] | None,
) -> None:
    built = []
    build_model = Checkpoint.build_model

    def noting(*arguments: Any) -> GPT:
        model = build_model(*arguments)
        built.append((model.cos.device.type, model.compute_dtype))
        return model

    if computed is None:
        chosen = choose_device("auto")
        computed = chosen.type, choose_dtype("auto", chosen)
    add(store, "base")
    add(store, "sft")
    monkeypatch.setattr(Checkpoint, "build_model", noting)
    report_on(store, recipe="demo", device=device, dtype=dtype)
    assert built == [computed] * 3, "held-out text, samples and held-out conversations"
    stored = {each["evaluation"]: each["settings"] for each in results(store, NAME)}
    assert stored.keys() == {"bpb", "samples", "conversations"}
    for settings in stored.values():
        assert (settings["device"], settings["dtype"]) == (computed[0], str(computed[1]).removeprefix("torch."))


def test_another_dtype_is_another_evaluation_whose_metrics_are_found_but_are_not_compared(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("a", "b"):
        base = add(store, "base", model)
        tuned = add(store, "sft", model, inputs={"base": base.weights_digest})
    report_on(store, "a", recipe="demo", device="cpu", dtype="fp32")
    report_on(store, "b", recipe="demo", device="cpu", dtype="fp32")
    assert compared(store, tmp_path / "same", "a", "b")[0]["not_comparable"] == []
    in_fp32 = {each["identity"] for each in results(store, "b")}

    found, _ = report_on(store, "b", recipe="demo", device="cpu", dtype="bf16")
    in_bf16 = {each["identity"] for each in results(store, "b")}
    assert len(in_fp32) == len(in_bf16) == 3
    assert not in_fp32 & in_bf16, "results in fp32 were taken for results in bf16"
    values, _ = compared(store, tmp_path / "other", "a", "b")
    assert values["figures"]["bpb.bits_per_byte"][1] == found["base"]["held_out_bits_per_byte"]
    assert values["figures"]["chat.accuracy"][1] == found["chat"]["accuracy"]
    assert {"bpb.bits_per_byte", "chat.accuracy"} <= set(values["not_comparable"])

    assert is_reported(store, "b", base, tuned)
    gate = Gate(require=("chat.accuracy>=0", "bpb.bits_per_byte>0"))
    decision = decide(store, tuned, gate, promoting=False)
    assert decision.accepted, "the gate finds the results in bf16"
    forbid_measuring(monkeypatch)
    assert report_on(store, "b", recipe="demo", device="cpu", dtype="bf16")[0] == found | {
        "promotion": decision.summary()
    }


def test_warnings_name_what_is_wrong_with_a_run(store: Store) -> None:
    add(store, "base", skipped_steps=[2, 3], finished=False)
    tuned = add(store, "sft", inputs={"base": "0" * 64})
    Evaluation.of(store, tuned, "core", {}).finish({"core": 0.1, "missing": ["squad"], "tasks": {}})
    report, text = report_on(store)
    assert (
        "2 steps of base/step_000004 had no finite loss or no usable gradient and were left out: 2, 3."
        in report["warnings"]
    )
    assert "base/step_000004 is not the end of its run." in report["warnings"]
    assert "sft/step_000004 was not made from the base checkpoint that is shown here." in report["warnings"]
    assert "CORE of sft is partial: squad missing." in report["warnings"]
    assert text.count("> **Note:** ") == 4


def test_a_stage_that_did_not_start_from_the_base_model_needs_no_warning(store: Store) -> None:
    base = add(store, "base", inputs={"dataset": "x", "base": "0" * 64}, base="sft/step_000009")
    tuned = add(store, "sft", inputs={"base": base.weights_digest}, base=base.ref.revision)
    taught = add(store, "lesson", inputs={"base": tuned.weights_digest, "items": "x"}, base=tuned.ref.revision)
    assert report_on(store, revision=taught.ref.revision)[0]["warnings"] == []


def test_evaluations_of_these_weights_are_shown_and_no_others(store: Store) -> None:
    base = add(store, "base")
    winograd = {"accuracy": 0.5, "baseline": 0.25, "centered": 1 / 3, "answers": 10, "shots": 0, "kind": "schema"}
    Evaluation.of(store, base, "core", {}).finish({"core": 1 / 3, "missing": [], "tasks": {"winograd": winograd}})
    assert "| winograd | schema | 0 | 10 | 50.0% | 25.0% | 0.3333 |" in report_on(store)[1]
    assert store.exists(f"reports/{NAME}/core.png")
    add(store, "base", depth=2)
    assert "winograd" not in report_on(store)[1]
    assert not store.exists(f"reports/{NAME}/core.png")


def test_all_chat_evaluations_of_a_checkpoint_are_shown(store: Store) -> None:
    tuned = add(store, "sft")
    for name, chatcore in (("gsm8k", 0.25), ("own", None)):
        evaluation = Evaluation.of(store, tuned, "chat", {"tasks": {name: "x"}}, key=name)
        evaluation.finish({"chatcore": chatcore, "missing": ["mmlu"] if chatcore else [], "tasks": {name: task(1, 4)}})
    report, text = report_on(store)
    assert "| gsm8k | 1 | 4 | 25.0% | 0.0% | 0.2500 | — |" in text
    assert "| own | 1 | 4 | 25.0% | 0.0% | 0.2500 | — |" in text
    assert "ChatCORE after fine-tuning: **0.2500** (partial: 1 tasks)." in text
    assert "ChatCORE of sft is partial: mmlu missing." in report["warnings"]


def test_a_benchmark_of_the_model_is_shown(store: Store) -> None:
    add(store, "base")
    row = {
        "mix": "decode", "slots": 8, "rate": None, "tokens_per_second": 1234.0,
        "time_to_first_token": [0.01, 0.02], "inter_token_latency": [0.001, 0.002],
    }  # fmt: skip
    machine = {"processor": "A processor", "cores": 2, "torch": "2"}
    for folder, model in (("engine", NAME), ("x", "another")):
        bench = {"target": {"model": model}, "machine": machine, "rows": [row]}
        store.write(f"reports/{folder}/bench.json", json.dumps(bench).encode())
    report, text = report_on(store)
    assert report["benchmark"]["folder"] == "engine"
    assert "| decode | 8 at once | 1,234 | 10.0 | 1.0 |" in text


def test_a_report_is_out_of_date_when_weights_or_what_was_measured_of_them_are_others(store: Store) -> None:
    base, tuned = add(store, "base"), add(store, "sft")
    assert not is_reported(store, NAME, base, tuned)
    report_on(store, recipe="demo")
    assert is_reported(store, NAME, base, tuned)
    Evaluation.of(store, base, "core", {}).finish({"core": 0.1, "missing": [], "tasks": {}})
    assert not is_reported(store, NAME, base, tuned)
    report_on(store, recipe="demo")
    assert is_reported(store, NAME, base, tuned)
    assert not is_reported(store, NAME, base, add(store, "sft", depth=2))
    old = {"base": {"digest": base.digests["model.safetensors"]}}
    store.write(f"reports/{NAME}/report.json", json.dumps(old).encode())
    assert not is_reported(store, NAME, base), "a report that does not name its evaluations"


def test_decisions_outlive_the_report_that_is_written_again_and_are_shown_in_it(store: Store) -> None:
    tuned = add(store, "sft")
    report_on(store)
    decide(store, tuned, Gate(require=("core.core>=0.2",)), promoting=True)
    before = store.read(f"reports/{NAME}/report.md").decode()
    assert "core.core was not measured; at least 0.2 is required" in before
    _, after = report_on(store)
    assert after == before
    assert len(decisions(store, tuned.ref)) == 1
    add(store, "sft", depth=2)
    assert "core.core" not in report_on(store)[1], "the decision was on other weights"


def test_a_price_makes_a_cost(store: Store) -> None:
    add(store, "base", train_seconds=1800.0)
    assert "| cost of that | 12.00 at 24 an hour |" in report_on(store, price_per_hour=24.0)[1]


def compared(store: Store, out: Path, *models: str) -> tuple[dict[str, Any], str]:
    lines: list[str] = []
    compare.run(CompareSettings(models=models, home=str(store), out=str(out)), lines.append)
    return json.loads((out / "compare.json").read_text()), "\n".join(lines)


def test_two_models_are_compared_by_what_differs(store: Store, tmp_path: Path) -> None:
    for model, depth, seed, accuracy in (("a", 1, 1, 0.5), ("b", 2, 2, 0.75)):
        checkpoint = add(store, "base", model, depth, settings={"dataset": NAME, "seed": seed})
        Evaluation.of(store, checkpoint, "conversations", {"items": 4}).finish({"accuracy": accuracy, "kinds": {}})
    values, text = compared(store, tmp_path / "out", "a", "b")
    assert values["settings"]["pretrain --seed"] == [1, 2]
    assert values["settings"]["shape: depth"] == [1, 2]
    assert "pretrain --dataset" not in values["settings"]
    assert values["figures"]["chat.accuracy"] == [0.5, 0.75]
    assert "| `chat.accuracy` | 0.5 | 0.75 | +0.25 |" in text
    assert values["not_comparable"] == []
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "![Curves of all models](curves.png)" in (tmp_path / "out" / "compare.md").read_text()


def test_models_of_other_stores_and_with_other_stages_can_be_compared(store: Store, tmp_path: Path) -> None:
    add(store, "base")
    other = open_store(str(tmp_path / "other"))
    other.write(f"tokenizers/{NAME}/tokenizer.json", store.read(f"tokenizers/{NAME}/tokenizer.json"))
    for stage in ("sft", "rl"):
        add(other, stage, "b")
    Evaluation.of(other, add(other, "sft", "c", history=[]), "conversations", {"items": 9}).finish(
        {"accuracy": 1.0, "kinds": {}}
    )
    values, text = compared(store, tmp_path / "out", NAME, f"{other}/models/b", f"{other}/models/c/")
    assert values["models"] == [NAME, "b", "c"]
    assert values["figures"]["base.final_loss"] == [0.75, None, None]
    assert "| — |" in text


def test_figures_that_were_measured_in_different_ways_are_marked(store: Store, tmp_path: Path) -> None:
    for model, items in (("a", 4), ("b", 5)):
        Evaluation.of(store, add(store, "sft", model), "conversations", {"items": items}).finish(
            {"accuracy": 0.5, "kinds": {}}
        )
    values, text = compared(store, tmp_path / "out", "a", "b")
    assert values["not_comparable"] == ["chat.accuracy"]
    assert "| `chat.accuracy` \\* | 0.5 | 0.5 | 0 |" in text


@pytest.mark.parametrize("models", [(), ("a",), ("a", "a")])
def test_one_model_alone_is_an_error(models: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"two models|named twice"):
        CompareSettings(models=models)


def test_the_recipe_is_the_one_that_made_the_model(store: Store) -> None:
    add(store, "sft")
    store.write(f"data/{NAME}/origin.json", b'{"recipe": "small"}')
    report, _ = report_on(store)
    assert report["recipe"] == "small"
    assert "fact" not in report["chat"]["kinds"]
    assert newest_checkpoint(store, NAME, "sft") is not None
    assert newest_stages(store, NAME).keys() == {"sft"}
