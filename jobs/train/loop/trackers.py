"""Where a run's numbers go besides this process: TensorBoard's event files and Weights & Biases.

Neither package is among what the jobs install; who wants one installs it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from nanochat_core.errors import UserError

_WANDB_SECRET = "WANDB_API_KEY"  # noqa: S105
_WANDB_PROJECT = "nanochat"

log = logging.getLogger("jobs.train.loop.trackers")


class Tracker(Protocol):
    """Takes numbers by step; what it does with them never ends a run."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note numbers, named like ``train/loss``, after a step."""

    def close(self) -> None:
        """Send what was not sent yet; nothing may be noted afterwards."""


def open_trackers(
    names: Sequence[str], *, model: str, stage: str, folder: Path, config: Mapping[str, Any], step: int
) -> list[Tracker]:
    """The trackers of these names (``tensorboard``, ``wandb``), each for the run of one stage of a model.

    Args:
        folder: of this machine, where they may write: event files go to ``<folder>/<model>/<stage>``.
        config: settings of the run, to be shown with it; a run with the same ones is the same run.
        step: steps that were done before. A run that is resumed goes on without a tracker that cannot be opened.

    Raises:
        UserError: there is no such tracker or its package is not installed; at step 0 also: it cannot be opened.
    """
    openers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(folder / model / stage, step),
        "wandb": lambda: WeightsAndBiases(model, stage, folder, config),
    }
    trackers: list[Tracker] = []
    for name in names:
        if name not in openers:
            raise UserError(f"--track has no {name!r}; choose of {', '.join(openers)}")
        try:
            trackers.append(Guarded(name, openers[name]()))
        except ImportError as error:
            raise UserError(f"--track {name} needs the package {name}; run: pip install {name}") from error
        except Exception as error:  # these packages raise errors of all kinds
            reason = _reason(error)
            if step == 0:
                raise UserError(f"--track {name} cannot be opened: {reason}") from error
            log.warning("going on without a tracker", extra={"tracker": name, "reason": reason})
    return trackers


class TensorBoard:
    """Event files for ``tensorboard --logdir``."""

    def __init__(self, folder: Path, step: int) -> None:
        """
        Args:
            step: what an earlier process noted after it is of steps that are done again, and hidden.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases, in the project ``WANDB_PROJECT`` or ``nanochat``."""

    def __init__(self, model: str, stage: str, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(dict(config), sort_keys=True, default=str)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _WANDB_PROJECT,
            name=f"{model}/{stage}",
            # A process that goes on where another stopped finds that one's run by its settings.
            id=f"{model}-{stage}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}",
            resume="allow",
            config=dict(config),
            dir=str(folder),
            # The console is the job's: its lines are JSON, and nobody asked to send them anywhere.
            settings=wandb.Settings(console="off", silent=True),
        )
        # Steps that are done again after a restart would be refused as steps of wandb's own count.
        self._run.define_metric("*", step_metric="step")
        log.info("tracking", extra={"tracker": "wandb", "run": self._run.url})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class Guarded:
    """Another tracker, until it fails: then it is named once and not asked again."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._failed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._try(lambda: self._tracker.log(step, metrics))

    def close(self) -> None:
        self._try(self._tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except Exception as error:  # whatever it is, a run of days does not end on its account
            self._failed = True
            extra = {"tracker": self._name, "reason": _reason(error)}
            log.warning("tracker failed, training goes on without it", extra=extra)


def _reason(error: Exception) -> str:
    """The error in one line, without the key should it be in it."""
    text = " ".join(str(error).split()) or type(error).__name__
    secret = os.environ.get(_WANDB_SECRET)
    return text.replace(secret, "***") if secret else text
