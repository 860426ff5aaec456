"""A request goes to the replica with the least work."""

import dataclasses

from services.gateway.engines.routing import least_loaded


@dataclasses.dataclass
class Engine:
    name: str
    load: int
    last_picked: int = 0


def test_the_least_loaded_replica_is_picked() -> None:
    assert least_loaded([Engine("a", 3), Engine("b", 1), Engine("c", 2)]).name == "b"


def test_equally_loaded_replicas_take_turns() -> None:
    engines = [Engine("a", 1), Engine("b", 1), Engine("c", 1)]
    picked = []
    for turn in range(1, 7):
        engine = least_loaded(engines)
        engine.last_picked = turn
        picked.append(engine.name)
    assert picked == ["a", "b", "c", "a", "b", "c"]
