"""The engines to which this gateway can send requests."""

import asyncio

from services.gateway.engines.replica import Replica
from services.gateway.engines.served_model import ServedModel
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings


class EnginePool:
    """The replicas and the tasks that watch them, with the gateway's settings and metrics."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        """The caller must run inside the event loop that will use the pool."""
        self.settings = settings
        self.metrics = metrics
        self.replicas = [Replica(address, settings, metrics) for address in settings.engine_addresses]
        self._watches = [asyncio.create_task(replica.watch()) for replica in self.replicas]

    async def close(self) -> None:
        """Stops watching and closes all connections."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for replica in self.replicas:
            await replica.close()

    def models(self) -> dict[str, ServedModel]:
        """Returns the models that requests can use now, by name.

        If the engines serve several revisions of a model, the result has the one that this gateway saw last.
        """
        served = [replica.model for replica in self.replicas if replica.available and replica.model]
        return {model.name: model for model in sorted(served, key=lambda model: model.created)}
