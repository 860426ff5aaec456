"""Decide whether a model may be promoted: ``python -m jobs.eval.gate --model demo --recipe demo``."""

import dataclasses
from collections.abc import Callable
from typing import Literal

from jobs.program import JobSettings, run_program
from jobs.promotion.decisions import Decision
from jobs.promotion.gate import decide
from jobs.promotion.rules import DEFAULT_NO_WORSE, Gate
from jobs.recipes import find_recipe
from nanochat_core.checkpoint import check_model_name, pick_checkpoint
from nanochat_core.errors import EXIT_REFUSED
from nanochat_core.settings import setting
from nanochat_core.store import open_store

_MARKS = {True: "holds", False: "fails", None: "n/a"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateSettings(JobSettings):
    """Decide whether the metrics of a checkpoint allow its promotion; the exit code is 3 if they do not."""

    model: str = setting(help="name of the model in the store")
    revision: str = setting("", "<stage>/step_<n> or promoted; empty for the newest RL or else SFT checkpoint")
    recipe: str = setting("", "recipe whose rules apply; --require and --no-worse are added to them")
    require: tuple[str, ...] = setting((), "thresholds, comma separated, such as chat.accuracy>=0.9,core.core>=0.2")
    no_worse: tuple[str, ...] = setting(
        (),
        "metrics that may be worse than for the promoted model by at most a margin, such as chat.accuracy:0.01; "
        f"empty applies the rules {', '.join(DEFAULT_NO_WORSE)} to the metrics that were measured in the same way",
    )
    against: str = setting("", "model whose promoted checkpoint to compare with; empty for the model itself")
    promote: bool = setting(False, "promote the checkpoint if the rules allow it")
    log_level: Literal["debug", "info", "warning", "error"] = setting("warning", "least severe level that is logged")

    def gate(self) -> Gate:
        """The rules of the recipe that ``--recipe`` names, and the rules that ``--require`` and ``--no-worse`` add."""
        given = find_recipe(self.recipe).gate if self.recipe else Gate()
        no_worse = (*(given.no_worse or ()), *self.no_worse) if self.no_worse else given.no_worse
        return Gate((*given.require, *self.require), no_worse)


def run(settings: GateSettings, show: Callable[[str], None]) -> Decision:
    """Decide, and show the decision with the outcome of each rule."""
    store = open_store(settings.home)
    model = check_model_name(settings.model)
    checkpoint = pick_checkpoint(store, model, settings.revision, "sft", "rl")
    decision = decide(store, checkpoint, settings.gate(), promoting=settings.promote, against=settings.against)
    verdict = "promoted" if decision.promoted else "may be promoted" if decision.accepted else "refused"
    show(f"{model} {checkpoint.ref.revision}: {verdict}")
    for outcome in decision.outcomes:
        show(f"  {_MARKS[outcome.passed]:<8} {outcome.reason}")
    return decision


def main(settings: GateSettings) -> None:
    if not run(settings, print).accepted:
        raise SystemExit(EXIT_REFUSED)


if __name__ == "__main__":
    run_program("jobs.eval.gate", "gate", GateSettings, main)
