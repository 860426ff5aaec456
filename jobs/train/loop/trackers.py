"""Experiment trackers: TensorBoard's event files and Weights & Biases.

The packages ``tensorboard`` and ``wandb`` are optional and not installed with the jobs.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat_core.errors import UserError

_WANDB_SECRET = "WANDB_API_KEY"  # noqa: S105

log = logging.getLogger("jobs.train.loop.trackers")


class Tracker:
    """Records metrics by step. After an error, nothing more is recorded. The error is logged, and the run goes on."""

    def __init__(
        self, name: str, record: Callable[[int, Mapping[str, float]], None], close: Callable[[], None]
    ) -> None:
        self._name, self._record, self._close = name, record, close
        self._failed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record ``metrics`` of a step by name. A name is, for example, ``train/loss``."""
        self._try(lambda: self._record(step, metrics))

    def close(self) -> None:
        """Send all recorded metrics. No metric may be recorded afterwards."""
        self._try(self._close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # Any error is caught, because the trackers' packages raise errors of many types.
            self._failed = True
            extra = {"tracker": self._name, "reason": _reason(error)}
            log.warning("tracker failed, training goes on without it", extra=extra)


def open_trackers(
    names: Sequence[str], *, model: str, stage: str, folder: Path, config: Mapping[str, Any], step: int
) -> list[Tracker]:
    """Open the trackers that ``names`` lists (``tensorboard``, ``wandb``) for one stage of a model.

    Args:
        folder: local folder for the trackers' files; TensorBoard's files go to ``<folder>/<model>/<stage>``.
        config: settings of the run. A resumed run is recognized by equal settings.
        step: number of steps that earlier processes have done. If it is not 0, a tracker that cannot be opened is left
            out instead of raising an error.

    Raises:
        UserError: a name is unknown, the package of a tracker is not installed, or at step 0 a tracker cannot be
            opened.
    """
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: _tensorboard(folder / model / stage, step),
        "wandb": lambda: _wandb(model, stage, folder, config),
    }
    trackers: list[Tracker] = []
    for name in names:
        if name not in openers:
            raise UserError(f"--track has no {name!r}; choose from {', '.join(openers)}")
        try:
            trackers.append(openers[name]())
        except ImportError as error:
            raise UserError(f"--track {name} needs the package {name}; run: pip install {name}") from error
        except Exception as error:  # Any error is caught, because the trackers' packages raise errors of many types.
            reason = _reason(error)
            if step == 0:
                raise UserError(f"--track {name} cannot be opened: {reason}") from error
            log.warning("going on without a tracker", extra={"tracker": name, "reason": reason})
    return trackers


def _tensorboard(folder: Path, step: int) -> Tracker:
    """A tracker that writes event files for ``tensorboard --logdir``."""
    from torch.utils.tensorboard import SummaryWriter

    # ``purge_step`` makes TensorBoard hide the later steps of an earlier process, because this process repeats these
    # steps.
    writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def record(step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", record, writer.close)


def _wandb(model: str, stage: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """A tracker that records a run on Weights & Biases, in the project ``WANDB_PROJECT`` or ``nanochat``."""
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(dict(config), sort_keys=True, default=str)
    run: Any = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or "nanochat",
        name=f"{model}/{stage}",
        # The id depends on the settings, so that a resumed run continues the same run on the server.
        id=f"{model}-{stage}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}",
        resume="allow",
        config=dict(config),
        dir=str(folder),
        # The console is off, so that the job's log lines are not sent to W&B.
        settings=wandb.Settings(console="off", silent=True),
    )
    # W&B's own step counter would refuse the steps that a resumed run repeats, so the metric ``step`` replaces it.
    run.define_metric("*", step_metric="step")
    log.info("tracking", extra={"tracker": "wandb", "run": run.url})
    return Tracker("wandb", lambda step, metrics: run.log({"step": step, **metrics}), run.finish)


def _reason(error: Exception) -> str:
    """The error in one line, with the secret API key masked."""
    text = " ".join(str(error).split()) or type(error).__name__
    secret = os.environ.get(_WANDB_SECRET)
    return text.replace(secret, "***") if secret else text
