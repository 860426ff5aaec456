"""A stage of a pipeline, and the interface of the runners. A runner runs stages as processes or as pods."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

from jobs.recipes import Flags, flag_arguments

# The machines that a stage needs. ``data``: only CPUs. ``evaluation``: CPUs, and at most one GPU. ``node``: one
# training node. ``nodes``: all training nodes.
Place = Literal["data", "evaluation", "node", "nodes"]


@dataclasses.dataclass(frozen=True)
class StageRun:
    """One program of a pipeline, with everything that its runner must know.

    Attributes:
        name: short name, such as ``pretrain``.
        subcommand: subcommand of the program ``module``; empty if it has none.
        inputs: digests of the data and weights that the stage uses. Two runs with equal module, subcommand, flags and
            inputs are the same work.
        start_over: whether to delete the checkpoints that an earlier run of the stage made from other inputs.
        progress: returns the revision of the newest checkpoint that was made from ``inputs``; empty if there is none.
        done: returns whether the store has the result of the stage.
    """

    name: str
    module: str
    flags: Flags
    place: Place
    subcommand: str = ""
    inputs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    start_over: bool = False
    progress: Callable[[], str] = lambda: ""
    done: Callable[[], bool] = lambda: False

    def arguments(self) -> list[str]:
        """Arguments of ``python -m`` that run the stage: the module, the subcommand and the flags.

        With ``start_over``, the arguments include ``--no-resume`` until a checkpoint from the current inputs exists.
        """
        arguments = [self.module, *filter(None, [self.subcommand]), *flag_arguments(self.flags)]
        if self.start_over and not self.progress():
            arguments.append("--no-resume")
        return arguments

    @property
    def digest(self) -> str:
        """The first 16 hexadecimal digits of the sha256 of module, subcommand, flags and inputs.

        Equal digits mean equal work.
        """
        work = [self.module, self.subcommand, dict(self.flags), dict(self.inputs)]
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()[:16]


class Runner(Protocol):
    """Runs the stages of a pipeline, one after another."""

    def forward_signals(self) -> None:
        """From now on, SIGTERM and SIGINT end this process in an orderly way."""

    def settle(self) -> None:
        """Wait for the end of all stages that an earlier process of the same pipeline has started."""

    def run(self, stage: StageRun) -> int:
        """Run a stage to its end, and return its exit code; 0 means that the stage is done."""

    def announce(self, reason: str, message: str, *, warning: bool = False) -> None:
        """Report an event of the pipeline: ``reason`` is a short name such as ``Promoted``, ``message`` a sentence."""
