"""The identity of a run: which settings and inputs must be the same to resume it."""

import dataclasses

from jobs.train.loop.run import differences
from jobs.train.loop.stage import StageSettings, comparable
from nanochat_core.settings import setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaterSettings(StageSettings):
    """Settings of a version that has one more setting than the version that wrote the checkpoint."""

    depth: int = setting(4)
    added_later: float = setting(0.5)


def test_a_setting_that_an_earlier_version_did_not_have_counts_as_its_default() -> None:
    old = {"settings": {"seed": 1, "dtype": "auto", "depth": 4}, "inputs": {"dataset": "0"}}
    inputs = {"dataset": "0"}
    same, other = LaterSettings(model="m"), LaterSettings(model="m", added_later=0.25)
    assert differences(old, {"settings": comparable(same), "inputs": inputs}, same) == []
    assert differences(old, {"settings": comparable(other), "inputs": inputs}, other) == ["added_later 0.5 -> 0.25"]


def test_a_setting_that_a_later_version_does_not_have_is_a_difference() -> None:
    now = LaterSettings(model="m")
    old = {"settings": {**comparable(now), "removed": 3}, "inputs": {}}
    assert differences(old, {"settings": comparable(now), "inputs": {"dataset": "1"}}, now) == [
        "removed 3 -> None",
        "dataset changed",
    ]
