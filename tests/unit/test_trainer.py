"""The training loop: skipped steps, loss spikes, measures, evaluations and checkpoints."""

import dataclasses
import gc
import json
import logging
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.train.batches.loader import Batch
from jobs.train.loop.run import Evaluation, RunConfig, TrainingDiverged, thinned
from jobs.train.loop.runtime import RunSettings, Runtime
from jobs.train.loop.schedule import Schedule
from jobs.train.loop.step import Objective, cross_entropy
from jobs.train.loop.trainer import Trainer
from nanochat_core.checkpoint import CheckpointRef, list_checkpoints, load_checkpoint, promote, promoted
from nanochat_core.config import ModelConfig
from nanochat_core.errors import RetryableError, UserError
from nanochat_core.model import GPT
from nanochat_core.store import FolderStore, StoreError
from nanochat_core.tokenizer import Tokenizer
from nanochat_core.training.distributed import ALONE
from nanochat_core.training.optim import MuonAdamW, OptimizerConfig, parameter_groups

TOKENIZER = Tokenizer([bytes([i]) for i in range(256)])
META: dict[str, Any] = {"settings": {}, "inputs": {}}


@dataclasses.dataclass
class Batches:
    """Replaces the loader with random rows that depend only on the step."""

    step: int

    def prefetched(self) -> Generator[Batch, None, None]:
        while True:
            ids = torch.randint(200, (4, 17), generator=torch.Generator().manual_seed(self.step))
            self.step += 1
            yield Batch(ids[:, :-1], ids[:, 1:], {"of": 1, "packers": {"0": {"cursor": self.step, "buffered": []}}})


def trainer(
    tmp_path: Path,
    steps: int,
    evaluations: Sequence[Evaluation] = (),
    objective: Callable[[Trainer], Objective] | None = None,
    **settings: Any,
) -> Trainer:
    model = GPT(ModelConfig.from_depth(1, vocab_size=TOKENIZER.vocab_size, head_dim=32, context_length=16))
    model.init_weights(torch.Generator().manual_seed(1))
    given = {"device_batch_rows": 4, "save_every": 0, "eval_every": 0, "compile": False}
    run: Trainer = Trainer(
        RunConfig("m", "base", Schedule(steps, warmup_steps=1), RunSettings(**given | settings), META),
        Runtime(FolderStore(tmp_path), torch.device("cpu"), ALONE),
        model,
        TOKENIZER,
        MuonAdamW(parameter_groups(model, OptimizerConfig(), batch_lr_scale=0.1)),
        open_batches=lambda state: Batches(state["packers"]["0"]["cursor"] if state else 0).prefetched(),
        evaluations=evaluations,
        objective=lambda rows: (objective(run) if objective else plain_loss(run))(rows),
    )
    return run


def plain_loss(run: Trainer) -> Objective:
    return cross_entropy(run.model, compile=False, device=torch.device("cpu"))


def spoiled(steps: dict[int, float]) -> Callable[[Trainer], Objective]:
    """An objective that multiplies the loss of some steps by a factor."""

    def objective(run: Trainer) -> Objective:
        def loss_of(rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            loss, measures = plain_loss(run)(rows)
            return loss * steps.get(run.state.step + 1, 1.0), measures

        return loss_of

    return objective


class Weights:
    """Copies the weights in an evaluation after every step."""

    def __init__(self) -> None:
        self.run: Trainer | None = None
        self.after: dict[int, list[Tensor]] = {}

    @property
    def evaluations(self) -> list[Evaluation]:
        return [Evaluation(self._copy, every=1)]

    def _copy(self) -> dict[str, float]:
        assert self.run is not None
        self.after[self.run.state.step] = [parameter.detach().clone() for parameter in self.run.model.parameters()]
        return {}

    def changed(self, step: int) -> bool:
        """Whether a step changed any weight."""
        return not all(map(torch.equal, self.after[step - 1], self.after[step]))


def test_a_step_without_a_finite_loss_changes_nothing_and_is_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = Weights()
    objective = spoiled({3: float("nan"), 4: float("inf")})
    weights.run = run = trainer(tmp_path, steps=6, evaluations=weights.evaluations, objective=objective)
    with caplog.at_level(logging.WARNING):
        ref = run.run()
    assert [step for step in range(2, 7) if not weights.changed(step)] == [3, 4]
    assert [record.step for record in caplog.records if record.message == "step skipped"] == [3, 4]
    meta = load_checkpoint(run.runtime.store, ref).meta
    assert meta["skipped_steps"] == [3, 4]
    assert [point["step"] for point in meta["history"] if "loss" in point] == [1, 2, 5, 6]
    assert [point["lr_factor"] for point in meta["history"][:2]] == [run.config.schedule.lr(step) for step in (0, 1)]


def test_a_gradient_that_is_not_finite_is_seen_though_the_loss_is(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=3)
    reduce = run.optimizer.reduce

    def broken() -> Tensor:
        if run.state.step == 1:
            parameter = run.model.blocks[0].mlp.up.weight  # type: ignore[union-attr]
            parameter.grad[0, 0] = float("inf")  # type: ignore[index]
        return reduce()

    run.optimizer.reduce = broken  # type: ignore[method-assign]
    run.run()
    assert run.state.skipped == [2]
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


def test_five_useless_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    objective = spoiled({step: float("nan") for step in (3, 4, 5, 6, 8, 9, 10, 11, 12)})
    run = trainer(tmp_path, steps=20, save_every=2, objective=objective)
    with pytest.raises(TrainingDiverged, match=r"at step 12, as in the 4 steps before; lower --lr-scale"):
        run.run()
    resumed = trainer(tmp_path, steps=20)
    assert resumed.resume()
    assert resumed.state.step == 10
    assert resumed.state.skipped == [3, 4, 5, 6, 8, 9, 10]


def dead_from(first: int, loss: float) -> Callable[[Trainer], Objective]:
    """From step ``first`` on, the objective is ``loss`` for each token, whatever the weights are."""

    def objective(run: Trainer) -> Objective:
        def loss_of(rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            total, measures = plain_loss(run)(rows)
            return (total if run.state.step + 1 < first else 0 * total + loss * rows.targets.numel()), measures

        return loss_of

    return objective


def test_a_loss_that_no_weight_changes_ends_the_run_after_five_warnings(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, steps=20, objective=dead_from(3, loss=15.0))
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(TrainingDiverged, match=r"loss is 15.0 and the gradient.s norm 0.0 at step 7.*lower --lr-scale"),
    ):
        run.run()
    assert [record.step for record in caplog.records if record.message == "step skipped"] == [3, 4, 5, 6]
    assert run.state.skipped == [3, 4, 5, 6, 7]


def test_garbage_collection_is_as_before_however_a_run_ends(tmp_path: Path) -> None:
    """Objects that stay frozen are not freed at exit, and a library then prints these objects."""

    def stop() -> dict[str, float]:
        assert gc.get_freeze_count() > 0
        raise SystemExit(143)

    run = trainer(tmp_path, steps=4, evaluations=[Evaluation(stop, every=2)])
    with pytest.raises(SystemExit):
        run.run()
    assert gc.get_freeze_count() == 0
    trainer(tmp_path, steps=2).run()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("reader", ["batches", "evaluation"])
def test_a_store_that_fails_in_the_middle_ends_the_attempt_but_not_the_run(tmp_path: Path, reader: str) -> None:
    away = True

    def read() -> dict[str, float]:
        if away:
            raise StoreError("the store is away")
        return {}

    def batches(position: dict[str, Any] | None) -> Generator[Batch]:
        loader = Batches(position["packers"]["0"]["cursor"] if position else 0)
        for batch in loader.prefetched():
            if loader.step == 4:
                read()
            yield batch

    def opened() -> Trainer:
        run = trainer(
            tmp_path, steps=6, save_every=2, evaluations=[Evaluation(read, every=3)] if reader == "evaluation" else ()
        )
        run._open_batches = batches if reader == "batches" else run._open_batches
        return run

    with pytest.raises(RetryableError, match=r"the store failed during training; run again .*: the store is away"):
        opened().run()
    away = False
    again = opened()
    assert again.resume()
    assert again.state.step == 2
    again.run()
    trainer(tmp_path / "whole", steps=6).run()
    interrupted, whole = (
        load_checkpoint(FolderStore(home), CheckpointRef("m", "base", 6)) for home in (tmp_path, tmp_path / "whole")
    )
    assert interrupted.weights_digest == whole.weights_digest


def test_a_loss_far_above_the_recent_ones_is_reported_and_trained_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(tmp_path, steps=130, objective=spoiled({120: 3.0}))
    with caplog.at_level(logging.WARNING):
        run.run()
    assert [record.step for record in caplog.records if record.message == "loss spike"] == [120]
    assert run.state.skipped == []
    assert [point["step"] for point in run.state.history] == list(range(1, 131))


def test_a_step_that_teaches_nothing_leaves_the_weights_to_themselves(tmp_path: Path) -> None:
    """The gradient of step 3 is zero. Muon must not make a full-length step from momentum alone."""
    weights = Weights()
    weights.run = run = trainer(tmp_path, steps=4, evaluations=weights.evaluations, objective=spoiled({3: 0.0}))
    run.run()
    assert {step: weights.changed(step) for step in (2, 3, 4)} == {2: True, 3: False, 4: True}
    assert run.state.skipped == []


def test_what_an_objective_measures_is_noted_per_counted_token_whatever_the_passes(tmp_path: Path) -> None:
    def measured(run: Trainer) -> Objective:
        def loss_of(rows: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            return plain_loss(run)(rows)[0], {"large": (rows.targets >= 100).sum().double()}

        return loss_of

    for rows in (4, 1):
        run = trainer(tmp_path / str(rows), steps=2, device_batch_rows=rows, objective=measured)
        run.run()
        expected = [float((next(Batches(step).prefetched()).targets >= 100).double().mean()) for step in (0, 1)]
        assert [point["large"] for point in run.state.history] == pytest.approx(expected)


def test_a_step_waits_once_for_its_numbers_from_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        copied.append(tensor.numel())
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    trainer(tmp_path, steps=3).run()
    assert copied == [4, 4, 4], "the loss, the stop signal, the counted targets and the tokens of each step"


def test_the_gradients_of_small_passes_add_up_to_the_gradient_of_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradient(rows: int) -> Tensor:
        run = trainer(tmp_path / str(rows), steps=1, device_batch_rows=rows)
        seen: list[Tensor] = []
        monkeypatch.setattr(run.optimizer, "step", lambda: seen.extend(g.flatten() for g in run.optimizer.gradients()))
        torch.nn.init.normal_(run.model.head.weight, generator=torch.Generator().manual_seed(2))
        run.run()
        return torch.cat(seen)

    whole = gradient(4)
    assert whole.norm() > 0
    for rows in (3, 1):
        assert (gradient(rows) - whole).norm() < 1e-6 * whole.norm()


def test_evaluations_may_come_before_the_first_step_and_have_metrics_of_several_numbers(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=3, evaluations=[Evaluation(lambda: {"passed": {"1": 0.5, "2": 0.75}}, 2, first=True)])
    run.run()
    evaluated = [point["step"] for point in run.state.history if "passed" in point]
    assert evaluated == [0, 2, 3]
    assert run.state.history[0] == {"step": 0, "passed": {"1": 0.5, "2": 0.75}}


def test_a_long_history_keeps_every_evaluation() -> None:
    history = [{"step": step, "loss": 1.0, "reward": 0.5} for step in range(1, 5001)]
    for point in history[99::100]:
        point["heldout_reward"] = 0.5
    thin = thinned(history)
    assert 2000 > len(thin) >= 1667
    assert sum("heldout_reward" in point for point in thin) == 50
    assert thin[-1] == history[-1]


def test_the_promoted_checkpoint_is_not_deleted_however_old_it_is(tmp_path: Path) -> None:
    trainer(tmp_path, steps=3, save_every=1, keep=3).run()
    promote(FolderStore(tmp_path), CheckpointRef("m", "base", 2))
    longer = trainer(tmp_path, steps=8, save_every=1, keep=2)
    longer.state.step = 3
    longer.run()
    kept = sorted(path.name for path in (tmp_path / "models/m/base").iterdir())
    assert kept == ["step_000002", "step_000007", "step_000008"]


@pytest.mark.parametrize(("step", "still_promoted"), [(1, True), (3, False)])
def test_a_run_that_starts_over_withdraws_the_promotion_of_a_checkpoint_that_it_deletes(
    tmp_path: Path, step: int, still_promoted: bool
) -> None:
    store, served = FolderStore(tmp_path), CheckpointRef("m", "base", step)
    trainer(tmp_path, steps=3, save_every=1, keep=3).run()
    promote(store, served)
    trainer(tmp_path, steps=1).run()
    assert promoted(store, "m") == (served if still_promoted else None)
    assert list_checkpoints(store, "m", "base") == [CheckpointRef("m", "base", 1)]


def make_newer(tmp_path: Path, step: int) -> None:
    """Change a checkpoint's manifest as if a newer version of nanochat had written it."""
    manifest = tmp_path / f"models/m/base/step_{step:06d}/MANIFEST.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format": content.get("format", 1) + 1}))


def test_a_run_does_not_start_over_if_it_would_have_to_delete_a_checkpoint_of_a_newer_version(tmp_path: Path) -> None:
    store, served = FolderStore(tmp_path), CheckpointRef("m", "base", 2)
    trainer(tmp_path, steps=3, save_every=1, keep=3).run()
    promote(store, served)
    make_newer(tmp_path, step=2)
    before = {key: store.read(key) for key in store.keys("models")}
    with pytest.raises(UserError, match=r"step_000002/MANIFEST\.json has format 2.* a newer version of nanochat"):
        trainer(tmp_path, steps=5, save_every=1, keep=1).run()
    assert {key: store.read(key) for key in store.keys("models")} == before
    assert promoted(store, "m") == served


def test_an_old_checkpoint_of_a_newer_version_is_not_deleted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, steps=3, save_every=1, keep=3).run()
    make_newer(tmp_path, step=2)
    longer = trainer(tmp_path, steps=5, save_every=1, keep=1)
    longer.state.step = 3
    longer.run()
    assert [ref.step for ref in list_checkpoints(FolderStore(tmp_path), "m", "base")] == [2, 5]
    kept = {record.checkpoint for record in caplog.records if record.message == "checkpoint kept"}
    assert kept == {"models/m/base/step_000002"}


def test_checkpoints_to_keep_for_good_are_not_deleted_and_half_written_ones_are(tmp_path: Path) -> None:
    torn = tmp_path / "models/m/base/step_000003/optim"
    torn.mkdir(parents=True)
    (torn / "rank_00000_of_00001.safetensors").write_bytes(b"half")
    trainer(tmp_path, steps=12, save_every=1, keep=2, keep_every=5).run()
    kept = sorted(path.name for path in (tmp_path / "models/m/base").iterdir())
    assert kept == ["step_000005", "step_000010", "step_000011", "step_000012"]


def test_a_step_to_keep_has_a_checkpoint_that_is_not_deleted(tmp_path: Path) -> None:
    run = trainer(tmp_path, steps=9, save_every=2, keep=1)
    run.config = run._checkpoints._config = dataclasses.replace(run.config, kept_step=3)
    run.run()
    assert [ref.step for ref in list_checkpoints(FolderStore(tmp_path), "m", "base")] == [3, 9]
