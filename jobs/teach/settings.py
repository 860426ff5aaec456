"""The settings of the program ``jobs.teach``."""

import dataclasses
from typing import Literal

from jobs.program import JobSettings
from nanochat_core.errors import UserError
from nanochat_core.lessons.records import Plan
from nanochat_core.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeachSettings(JobSettings):
    """Teach a promoted model what a file says, and promote the taught model if the promotion gate accepts it."""

    lesson: tuple[str, ...] = setting(
        help="the model, and the file to learn from (.jsonl, .md or text), with or without --lesson before them; "
        "without a file, the model's queued and interrupted lessons are given",
        positional=True,
    )
    list: bool = setting(False, "only list the model's lessons")
    roll_back: int | None = setting(
        None,
        "only promote again the model that the lesson with this number made; 0 is the model before its first lesson",
        minimum=0,
    )
    cancel: int | None = setting(
        None, "only cancel the lesson with this number, before the gate decides on it", minimum=1
    )
    end_canceled: int | None = setting(
        None,
        "only end the canceled lesson with this number, after its program has ended; jobs.teach.watch uses this flag",
        minimum=1,
    )
    until: int = setting(
        0,
        "last lesson to give of the queued and interrupted lessons, if there is no file; 0 gives all of them",
        minimum=0,
    )
    replay: str = setting(
        "",
        "mixture of conversations that the model must not forget; by default, the mixture of its fine-tuning or, if "
        "that is not known or not in the store, answers of the model itself",
    )
    seed: int = setting(Plan.seed, "seed of all random choices in the lesson", minimum=0)
    share: float = setting(
        Plan.share,
        "share of the training examples that show the lesson; a lesson of few items gets a smaller share",
        minimum=0.01,
        maximum=1.0,
    )
    lr_scale: float = setting(
        Plan.lr_scale,
        "factor on all of pretraining's base learning rates except those of smear and backout",
        minimum=0.0,
    )
    batch_tokens: int = setting(Plan.batch_tokens, "tokens per optimizer step", minimum=16)
    max_steps: int = setting(Plan.max_steps, "largest number of optimizer steps", minimum=1, maximum=100_000)
    margin: float = setting(
        Plan.margin,
        "largest permitted decrease in the share of right answers to other questions",
        minimum=0.0,
        maximum=1.0,
    )
    threads: int = setting(0, "CPU threads; 0 leaves the choice to torch", minimum=0, maximum=4096)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device to train on")

    def __post_init__(self) -> None:
        numbers = (self.roll_back, self.cancel, self.end_canceled)
        others = self.list + sum(number is not None for number in numbers)
        if others > 1:
            raise UserError("--list, --roll-back, --cancel and --end-canceled exclude each other")
        alone = others or self.until
        if len(self.lesson) > 2 or (alone and len(self.lesson) > 1):
            raise UserError(
                "name the model, and nothing else" if alone else "name the model and one file to learn from"
            )

    @property
    def plan(self) -> Plan:
        """The settings that are stored with a lesson, because they decide which weights the training gives."""
        return Plan(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Plan)})
