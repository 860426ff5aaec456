"""One optimizer step: forward and backward passes over micro-batches, checks of loss and gradient, and the update.

The step minimizes the mean loss over the N counted targets of the global batch, that is, of all ranks together. Each
micro-batch contributes its summed loss divided by N. So the gradients of micro-batches and ranks add up to the gradient
of the mean, however the batch is divided.
"""

import dataclasses
import functools
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jobs.train.batches.loader import Batch
from jobs.train.loop.compiler import prepare_compiler
from jobs.train.loop.run import RunConfig, RunState, TrainingDiverged
from jobs.train.loop.runtime import Runtime, StopSignal
from nanochat_core.device import precise_dtype
from nanochat_core.errors import UserError
from nanochat_core.model import GPT, IGNORE_INDEX, run_block
from nanochat_core.training.loss_scaling import LossScaler
from nanochat_core.training.optim import MuonAdamW

# One bad batch can happen by chance. After this many skipped steps in a row, the run counts as diverged.
_MAX_SKIPPED_IN_A_ROW = 5
# A loss is a spike if it is this many standard deviations above the moving mean of the recent losses.
_SPIKE_DEVIATIONS = 6.0
_SPIKE_DECAY = 0.98
_SPIKE_AFTER_STEPS = 100
# Ranks wait this long for ranks that compile, because in a large cluster, some ranks find compiled code in a cache,
# while other ranks compile for many minutes.
_COMPILE_TIMEOUT_SECONDS = 3600.0

# An objective is a function that computes a micro-batch's loss and further measures, summed over its counted targets.
Objective = Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]

log = logging.getLogger("jobs.train")


@dataclasses.dataclass(kw_only=True)
class StepReport:
    """The outcome of one optimizer step.

    Attributes:
        step: number of steps done, this one included.
        tokens: size of the global batch, all ranks together.
        loss: mean of the objective over the counted tokens of the global batch; for cross-entropy, it is in nats.
        gradient_norm: Euclidean norm of the gradient over all parameters.
        lr_factor: the schedule's factor on the learning rates.
        measures: further numbers that the stage measures in a step, such as the mean reward.
        coverage: how much of the data was shown so far, such as the number of epochs; empty if that is not counted.
        stopped_by: number of the signal that asked any rank to stop (with several ranks, always SIGTERM); 0 if there
            was no signal.
        skipped: True if the weights were not updated, because loss or gradient was not finite, or because the gradient
            was zero and the loss was not.
        spike: True if the loss is far above the recent losses.
        seconds: duration of the whole step.
        data_wait_seconds: part of ``seconds`` that was spent waiting for the batch.
    """

    step: int
    tokens: int
    loss: float
    gradient_norm: float
    lr_factor: float
    measures: dict[str, float] = dataclasses.field(default_factory=dict)
    coverage: dict[str, float] = dataclasses.field(default_factory=dict)
    stopped_by: int = 0
    skipped: bool = False
    spike: bool = False
    seconds: float = 0.0
    data_wait_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class TrainingStep:
    """Updates a model from one batch after another, and keeps the run's state up to date.

    If the loss or the gradient is not finite, every rank skips the update. The update is also skipped if the gradient
    is zero but the loss is not: then no weight affects the loss any more, for example after a step that was far too
    large. If both are zero, the weights stay unchanged too, but the step does not count as skipped. Five skipped steps
    in a row end the run; in an fp16 run, steps that are not finite count only once the loss scaler cannot lower its
    factor any more. A loss far above the recent losses is reported, but its step is done as usual.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: MuonAdamW,
        objective: Objective,
        config: RunConfig,
        runtime: Runtime,
        state: RunState,
    ) -> None:
        self._optimizer, self._objective, self._schedule = optimizer, objective, config.schedule
        self._micro_batch_rows, self._state = config.settings.device_batch_rows, state
        self._device, self._ranks = runtime.device, runtime.ranks
        self._skipped_in_a_row = 0
        self._scaler: LossScaler | None = None
        if model.compute_dtype == torch.float16:
            factor = state.loss_factor
            self._scaler = LossScaler() if factor is None else LossScaler(factor, state.good_steps)

    def compile(self, batch: Batch) -> None:
        """Let every rank compile the model before any rank waits for another rank.

        Otherwise a rank that compiles for a long time would look like a rank that has died.
        """
        if self._ranks.size == 1:
            return
        # One micro-batch of each shape is computed, because the model is compiled for each shape, and the last
        # micro-batch may have fewer rows than the others.
        for rows in {rows.ids.shape: rows for rows in self._micro_batches(batch)}.values():
            loss, _ = self._objective(rows)
            torch.autograd.backward(loss)
        self._optimizer.zero_grad()
        self._ranks.side_channel(_COMPILE_TIMEOUT_SECONDS).gather(None)

    def __call__(self, batches: Iterator[Batch], stop: StopSignal) -> StepReport:
        """Take this rank's rows of the next global batch, compute their gradient and update the weights.

        If any rank has received a stop signal, the reports of all ranks say so, and all ranks stop after the same step.

        Raises:
            TrainingDiverged: five steps in a row were skipped (of an fp16 run, five that count; see the class).
            UserError: the batch has no counted target on any rank.
        """
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        report = self._accumulate(batch, stop)
        self._state.step, self._state.loader = report.step, batch.state
        finite = math.isfinite(report.loss) and math.isfinite(report.gradient_norm)
        report.skipped = not finite or (report.loss != 0 and report.gradient_norm == 0)
        if report.skipped:
            self._skip(report.loss, report.gradient_norm, overflow=not finite)
        self._unscale(finite)
        if not report.skipped:
            self._skipped_in_a_row = 0
            self._update(report)
        report.seconds, report.data_wait_seconds = time.perf_counter() - started, waited
        return report

    def _accumulate(self, batch: Batch, stop: StopSignal) -> StepReport:
        """Sum loss, measures and gradients over all micro-batches and ranks."""
        # The targets are counted while the batch is in the host's memory, so that counting does not wait for the
        # device.
        count = int((batch.targets != IGNORE_INDEX).sum())
        counted = self._ranks.sum(torch.full((), count, dtype=torch.int64, device=self._device))
        # The sum has double precision if the device supports it, so that its rounding hardly depends on the number of
        # ranks.
        total = torch.zeros((), dtype=precise_dtype(self._device), device=self._device)
        sums: dict[str, Tensor] = {}
        micro_batches = list(self._micro_batches(batch))
        for i, rows in enumerate(micro_batches):
            if i == len(micro_batches) - 1:
                # The optimizer is told which micro-batch is the last one: there, the ranks sum each gradient as soon as
                # the backward pass has computed it.
                self._optimizer.expect_gradients()
            loss, measures = self._objective(rows)
            loss = loss / counted
            torch.autograd.backward(loss * self._scaler.factor if self._scaler else loss)
            total += loss.detach()
            for name, value in measures.items():
                sums[name] = sums.get(name, torch.zeros_like(total)) + value / counted
        norm = self._optimizer.reduce()
        # All other sums that the rest of the step needs are reduced together. Afterwards, they are equal on every rank.
        own = [stop.number, count, batch.ids.numel() if count else 0, *batch.coverage.values()]
        reduced = self._ranks.sum(torch.cat([torch.stack([total, *sums.values()]), total.new_tensor(own)]))
        numbers = reduced.tolist()  # one copy from the device
        loss_value, *values = numbers[: 1 + len(sums)]
        stops, all_counted, tokens, *coverage = numbers[1 + len(sums) :]
        if not all_counted:
            raise UserError("a batch has no target that counts, on any rank; report this with the data that caused it")
        return StepReport(
            step=self._state.step + 1,
            tokens=round(tokens),
            loss=loss_value,
            gradient_norm=float(norm) / (self._scaler.factor if self._scaler else 1.0),
            lr_factor=self._schedule.lr(self._state.step),
            measures=batch.measures | dict(zip(sums, values, strict=True)),
            coverage=dict(zip(batch.coverage, coverage, strict=True)),
            stopped_by=signal.SIGTERM if stops and self._ranks.size > 1 else int(stops),
        )

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        rows = self._micro_batch_rows
        for start in range(0, batch.ids.size(0), rows):
            yield batch.rows(start, start + rows).to(self._device)

    def _update(self, report: StepReport) -> None:
        if not report.gradient_norm:
            # The loss is zero too, so the batch teaches nothing, for example because all answers have equal rewards.
            # There is no update, because Muon would make a full step from its momentum alone.
            self._optimizer.zero_grad()
            return
        step = report.step - 1
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * report.lr_factor
            if group["kind"] == "muon":
                group["momentum"] = self._schedule.momentum(step)
                group["weight_decay"] = group["initial_weight_decay"] * self._schedule.weight_decay(step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        report.spike = self._is_spike(report.loss)

    def _unscale(self, finite: bool) -> None:
        """In an fp16 run, divide the gradients by the loss scaler's factor, and choose the factor of the next step.

        The loss was multiplied by the factor before the backward pass. If ``finite`` is False, the step is skipped, so
        the gradients need not be divided.
        """
        if self._scaler is None:
            return
        if finite:
            torch._foreach_mul_(self._optimizer.gradients(), 1 / self._scaler.factor)
        self._scaler.update(finite=finite)
        self._state.loss_factor, self._state.good_steps = self._scaler.factor, self._scaler.good_steps

    def _skip(self, loss: float, norm: float, *, overflow: bool) -> None:
        self._optimizer.zero_grad()
        step = self._state.step
        self._state.skipped.append(step)
        # If the loss scaler can still lower its factor, an overflow does not count toward the limit of skipped steps in
        # a row, because it does not mean that the run has diverged.
        self._skipped_in_a_row += 0 if overflow and self._scaler and self._scaler.factor > 1 else 1
        if self._skipped_in_a_row >= _MAX_SKIPPED_IN_A_ROW:
            raise TrainingDiverged(
                f"the loss is {loss} and the gradient's norm {norm} at step {step}, as in the "
                f"{_MAX_SKIPPED_IN_A_ROW - 1} steps before"
            )
        log.warning("step skipped", extra={"step": step, "loss": loss, "gradient_norm": norm})

    def _is_spike(self, loss: float) -> bool:
        """Whether the loss is far above the recent losses. Afterwards, the moving statistics include this loss."""
        state = self._state
        if not state.loss_mean:
            state.loss_mean = loss
        excess = loss - state.loss_mean
        spike = state.step > _SPIKE_AFTER_STEPS and excess > _SPIKE_DEVIATIONS * math.sqrt(state.loss_variance)
        state.loss_mean += (1 - _SPIKE_DECAY) * excess
        state.loss_variance = _SPIKE_DECAY * (state.loss_variance + (1 - _SPIKE_DECAY) * excess**2)
        if spike:
            log.warning("loss spike", extra={"step": state.step, "loss": loss, "recent": round(state.loss_mean, 4)})
        return spike


def cross_entropy(model: GPT, *, compile: bool, device: torch.device) -> Objective:
    """Return the cross-entropy of the next tokens as an objective, compiled if ``compile`` is set.

    Set ``compile`` only if :func:`~jobs.train.loop.compiler.can_compile` says that compiling is possible.

    On a CPU, each kind of block is compiled once for all layers. Steps are nearly as fast as with a model that is
    compiled as a whole. Compiling the whole model would take much longer, because the time grows with the number of
    layers.
    """
    loss: Callable[..., Tensor] = model.loss
    if compile:
        prepare_compiler(device)
        if device.type == "cpu":
            loss = functools.partial(model.loss, compiled_block=torch.compile(run_block, dynamic=False))
        else:
            loss = torch.compile(model.loss, dynamic=False)
    return lambda rows: (loss(rows.ids, rows.targets, "sum"), {})
