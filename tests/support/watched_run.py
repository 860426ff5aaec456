"""Follows a real training through the gateway's `/progress`, as the chat page does."""

from collections.abc import Mapping
from typing import Any

STAGES = ("data", "tokenizer", "base", "sft", "report")


class WatchedRun:
    """Collects answers of `/progress` during one training, and checks that they show the training from its beginning.

    Attributes:
        snapshot: revision of the newest snapshot that answered before the promotion; empty if there was none.
    """

    def __init__(self) -> None:
        self.snapshot = ""
        self._run: Mapping[str, Any] = {}
        self._stages: list[str] = []
        self._steps: dict[str, list[int]] = {}
        self._answers: dict[str, dict[int, list[str]]] = {}
        self._served = self._promoted = ""

    @property
    def done(self) -> bool:
        """Whether the promoted model answers."""
        return self._promoted != "" and self._served == self._promoted

    def see(self, progress: Mapping[str, Any]) -> None:
        """Add one answer of `/progress`."""
        self._run = progress["run"] or {}
        if (stage := self._run.get("stage")) and stage not in self._stages[-1:]:
            self._stages.append(stage)
        for name, part in progress["stages"].items():
            steps = self._steps.setdefault(name, [])
            assert part["step"] >= (steps or [0])[-1], f"the steps of {name} went back"
            steps.append(part["step"])
            for said in part["answers"]:
                self._answers.setdefault(name, {})[said["step"]] = [text for _, text in said["answers"]]
        self._promoted, self._served = progress["promoted"] or "", progress["served"] or ""
        if self._served and not self._promoted:
            self.snapshot = self._served

    def check(self) -> None:
        """Assert that one saw stages in their order, growing steps, new answers, a snapshot, and then the promotion."""
        assert self._stages == [stage for stage in STAGES if stage in self._stages]
        assert {"base", "sft", "report"} <= set(self._stages)
        for name in ("base", "sft"):
            assert len(set(self._steps[name])) >= 3, (
                f"{name} was seen only at the steps {sorted(set(self._steps[name]))}"
            )
            assert len(set(map(tuple, self._answers[name].values()))) >= 2, f"the answers of {name} never changed"
        assert self.snapshot.startswith("sft/"), "no snapshot answered before the promotion"
        assert self.done
        assert self._run["state"] == "promoted"
