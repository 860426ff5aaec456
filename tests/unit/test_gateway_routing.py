"""A request goes to the replica with the least work."""

from services.gateway.engines.replica import Replica
from services.gateway.engines.routing import least_loaded
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings


def replica(address: str) -> Replica:
    return Replica(address, GatewaySettings(), Metrics())


async def test_the_least_loaded_replica_is_picked() -> None:
    a, b, c = map(replica, ("a:1", "b:1", "c:1"))
    with a.busy(3), b.busy(1), c.busy(2):
        assert least_loaded([a, b, c]) is b


async def test_equally_loaded_replicas_take_turns() -> None:
    replicas = [replica(f"{name}:1") for name in "abc"]
    picked = []
    for turn in range(1, 7):
        chosen = least_loaded(replicas)
        chosen.last_picked = turn
        picked.append(chosen.address)
    assert picked == ["a:1", "b:1", "c:1", "a:1", "b:1", "c:1"]
