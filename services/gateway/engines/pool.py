"""Finds all engines, watches them, and reserves room at one of them for each request."""

import asyncio
import collections
import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Collection, Iterable, Sequence

from nanochat_core.discovery import Endpoint, addresses_of, split_target, watch_endpoints
from services.gateway.engines.model import ServedModel
from services.gateway.engines.replica import Connect, Place, Replica
from services.gateway.engines.retries import RetryBudget
from services.gateway.engines.waiting import FairQueue, QueueFull, Ticket
from services.gateway.errors import bad_request, engines_busy, model_not_found, no_engine, queue_full
from services.gateway.metrics import Metrics
from services.gateway.routing import Canary, Prompt, Router, RoutingSettings
from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

Lookup = Callable[[str], Iterable[str]]


@dataclasses.dataclass(eq=False)
class Wish:
    """The requirements that the engine of a request must meet, and preferences for the choice of the engine.

    Attributes:
        name: the model's name in the request; None or an empty name stands for the only model that is served.
        sequences: number of sequences that the engine has to run.
        prompt: the encoded prompt; empty before it is encoded. It only affects the choice among the engines that fit.
        weights: digest of the weights that the engine must have; None allows any weights. An empty digest fits no
            engine; it comes from an engine that reports no digest.
        avoid: addresses of engines that the request must not use, because they have failed on it, or have refused it
            twice because they have another model. The set is empty again once another engine answers.
        canary: whether the request goes to the canary (a new revision on trial); None while this is undecided.
    """

    name: str | None
    sequences: int = 1
    prompt: Prompt = dataclasses.field(default_factory=Prompt)
    weights: str | None = None
    avoid: set[str] = dataclasses.field(default_factory=set)
    canary: bool | None = None

    def fits(self, model: ServedModel, aliases: Collection[str]) -> bool:
        """Whether the model can answer the request. ``aliases`` are names that stand for every model."""
        if self.weights is not None:
            return self.weights != "" and model.weights == self.weights
        return not self.name or self.name in aliases or self.name == model.info.name


class EnginePool:
    """The replicas (engines) of the gateway, and the tasks that find and watch them."""

    def __init__(
        self, settings: GatewaySettings, metrics: Metrics, connect: Connect, lookup: Lookup = addresses_of
    ) -> None:
        """The caller must run inside the event loop that will use the pool.

        ``lookup`` returns the addresses of a host name.
        """
        self.settings = settings
        self.metrics = metrics
        self.retries = RetryBudget()
        self._connect = connect
        self._router = Router(RoutingSettings(report_seconds=settings.poll_seconds))
        self._in_router: set[Replica] = set()
        self._canary = Canary(settings.canary, settings.canary_percent)
        metrics.canary_percent.set_function(lambda: self._canary.percent)
        metrics.canary_returned.set_function(lambda: self._canary.returned)
        self._replicas: dict[str, Replica] = {}
        self._watches: dict[Replica, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._queue: FairQueue[Place] = FairQueue(settings.queue_size)
        metrics.queue_length.set_function(lambda: self._queue.length)
        self._hosts = {split_target(target)[0] for target in settings.engine_addresses}
        self._unfound = self._hosts  # host names for which the last lookup found no address
        self._discovery = asyncio.create_task(
            watch_endpoints(settings.engine_addresses, self._set_endpoints, settings.discovery_seconds, lookup)
        )

    async def aclose(self) -> None:
        """Stops watching the engines, and closes the connections to all engines."""
        tasks = [self._discovery, *self._watches.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in list(self._watches):  # a leaving engine may become idle meanwhile, and is then removed
            await replica.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        found = {endpoint.address: endpoint for endpoint in endpoints}
        self._unfound = self._hosts - {endpoint.host for endpoint in endpoints}
        for address, endpoint in found.items():
            if address not in self._replicas:
                logger.info("engine joined", extra={"address": address})
                replica = Replica(endpoint, self._connect, self.settings, self.metrics, self._changed)
                self._replicas[address] = replica
                self._watches[replica] = asyncio.create_task(replica.watch())
            self._replicas[address].leaving = False
        for address in self._replicas.keys() - found.keys():
            replica = self._replicas[address]
            if not replica.leaving:
                logger.info("engine left", extra={"address": address})
                replica.leaving = True
                self._changed(replica)

    def _changed(self, replica: Replica) -> None:
        """Tells the router and the queue that a replica's state may have changed.

        A replica that is leaving and has no more sequences of this gateway is removed.
        """
        if replica.up and replica not in self._in_router:
            self._in_router.add(replica)
            self._router.joined(replica.address, time.monotonic())
        elif not replica.up and replica in self._in_router:
            self._in_router.remove(replica)
            self._router.left(replica.address)
        if replica.leaving and replica.idle and self._replicas.get(replica.address) is replica:
            del self._replicas[replica.address]
            self.metrics.engine_up.remove(replica.address)
            watch = self._watches.pop(replica)
            watch.cancel()
            closing = asyncio.create_task(self._close(replica, watch))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
        self._queue.serve()

    async def _close(self, replica: Replica, watch: asyncio.Task[None]) -> None:
        await asyncio.gather(watch, return_exceptions=True)
        await replica.close()

    def replicas(self) -> list[Replica]:
        """Returns all known engines, in the order of their addresses."""
        return [self._replicas[address] for address in sorted(self._replicas)]

    def models(self) -> dict[str, ServedModel]:
        """Returns the models that engines serve now, by name.

        If the engines serve several revisions of a model, the result has the revision whose description this gateway
        read last. The result has the canary (a new revision on trial, :class:`Canary`) only if no engine serves another
        revision.
        """
        served = [replica.model for replica in self._replicas.values() if replica.up and replica.model]
        return {model.info.name: model for model in sorted(served, key=self._standing)}

    def _standing(self, model: ServedModel) -> tuple[bool, int]:
        """The key by which one of several revisions is chosen to describe a model: the largest key is chosen."""
        return not self._canary.serves(model.identity), model.created

    def waits_for(self) -> str | None:
        """Returns a text that says what requests wait for, or None if an engine can answer them now."""
        replicas = [replica for replica in self._replicas.values() if not replica.leaving]
        if any(replica.up for replica in replicas):
            return None
        if not replicas:
            return "No engine has been found yet."
        loading = sum((replica.why_down or "").startswith(("health is", "it is")) for replica in replicas)
        states = collections.Counter({"not ready (loading a model or shutting down)": loading})
        states["not reachable"] = len(replicas) - loading
        parts = [f"{count} {'is' if count == 1 else 'are'} {state}" for state, count in states.items() if count]
        said = sorted({replica.waits_for for replica in replicas if replica.waits_for})
        return " ".join(
            [
                f"Of {len(replicas)} known engine{'s' if len(replicas) > 1 else ''}, {' and '.join(parts)}.",
                *(f"An engine says: {reason}." for reason in said),
            ]
        )

    def model(self, name: str | None) -> ServedModel | None:
        """Returns a model that answers requests for ``name``, or None while no known engine serves such a model.

        If engines have several revisions of the model, the result is chosen as in :meth:`models`, but also among
        engines that are down.

        Raises:
            ApiError: 404 if the models of all engines are known and no engine has the model, 400 if the request must
                name one of several models.
        """
        known = [replica.model for replica in self._replicas.values() if replica.model and not replica.leaving]
        fitting = [model for model in known if Wish(name).fits(model, self.settings.model_aliases)]
        if not fitting and not self._expecting():
            raise model_not_found(name or "", {model.info.name for model in known})
        served = self.models()
        if not name and len(served) > 1:
            raise bad_request(f"Name the model to use: {', '.join(sorted(served))}.", "model", "model_required")
        return max(fitting, key=self._standing, default=None)

    def _expecting(self) -> bool:
        """Whether the model of some engine is not known yet, because the engine is loading or has not been found."""
        unknown = any(replica.model is None and not replica.leaving for replica in self._replicas.values())
        return unknown or bool(self._unfound)

    def pick(self, name: str | None) -> tuple[Replica, ServedModel]:
        """Returns a healthy replica and the model that it serves, for a short call without reserved room.

        Raises:
            ApiError: 404 or 400 for the same reasons as in :meth:`model`; 503 if no healthy engine has the model.
        """
        self.model(name)
        for replica in self._replicas.values():
            if replica.up and replica.model and Wish(name).fits(replica.model, self.settings.model_aliases):
                return replica, replica.model
        raise no_engine()

    def reachable(self) -> list[Replica]:
        """Returns the replicas for a call that an engine answers even without a model; healthy replicas come first."""
        return sorted((each for each in self._replicas.values() if not each.leaving), key=lambda each: not each.up)

    def prompt(self, ids: Sequence[int]) -> Prompt:
        """Returns the object that a :class:`Wish` needs for a prompt with the token ids ``ids``."""
        return self._router.prompt(ids)

    def ticket(self, wish: Wish, *, caller: str, priority: int) -> Ticket[Place]:
        """Returns the ticket with which a request can wait in :meth:`place`."""
        take = functools.partial(self._take, wish)
        return Ticket(take, Place.give_back, caller=caller, priority=priority, cost=wish.sequences)

    async def place(self, wish: Wish, ticket: Ticket[Place], seconds: float | None) -> Place:
        """Waits for a replica with room for the request, and reserves the room.

        The wait lasts at most ``seconds`` seconds. If ``seconds`` is None, the wait has no limit.

        Raises:
            ApiError: 404 or 400 for the same reasons as in :meth:`model`; 429 if too many requests wait already; 503 if
                no replica has room within ``seconds``.
        """
        if wish.canary is None:
            wish.canary = self._canary.draws()
        ticket.kind = (wish.name, wish.weights, wish.sequences, frozenset(wish.avoid), wish.canary)
        began = time.monotonic()
        try:
            place = await self._queue.wait(ticket, seconds)
        except QueueFull:
            self.metrics.queue_refusals.labels("full").inc()
            raise queue_full() from None
        except TimeoutError:
            self.metrics.queue_refusals.labels("late").inc()
            up = any(wish.fits(model, self.settings.model_aliases) for model in self.models().values())
            raise (engines_busy() if up else no_engine()) from None
        self.metrics.queue_seconds.observe(time.monotonic() - began)
        return place

    def began(self, ticket: Ticket[Place]) -> None:
        """Records that an engine has begun the answer of the ticket's request."""
        self._queue.served(ticket)

    def promising(self, wish: Wish) -> bool:
        """Whether a search for an engine may succeed: a known engine fits the wish, or such an engine may still appear.

        If an engine has already failed on the request, engines whose model is unknown count only while no engine serves
        a model.
        """
        return any(self._fitting(wish)) or not self.models() or (not wish.avoid and self._expecting())

    def _fitting(self, wish: Wish) -> Iterable[Replica]:
        for address, replica in self._replicas.items():
            available = address not in wish.avoid and not replica.leaving
            if available and replica.model and wish.fits(replica.model, self.settings.model_aliases):
                yield replica

    def _take(self, wish: Wish) -> Place | None:
        """Reserves room at the replica that the router chooses.

        Returns None if no replica that may get the request has room.
        """
        if wish.weights is None:
            self.model(wish.name)
        ready = [replica for replica in self._fitting(wish) if replica.has_room(wish.sequences)]
        if not ready:
            return None
        now = time.monotonic()
        # If all replicas are ejected, use them anyway, because a call that may fail is better than none.
        ready = [replica for replica in ready if replica.outlier.allows(now)] or ready
        if self.settings.canary and wish.weights is None and not (ready := self._share(wish, ready)):
            return None
        chosen = self._router.choose(wish.prompt, {replica.address: replica.load for replica in ready}, now)
        self._router.sent(chosen, wish.prompt, now)
        return self._replicas[chosen].reserve(wish.sequences)

    def _share(self, wish: Wish, ready: Sequence[Replica]) -> list[Replica]:
        """Returns the ready replicas that may get the request, so that the canary gets its share of the requests.

        A request for the canary does not wait for it: if no replica of the canary is ready, another revision answers.
        The other requests wait for a replica of another revision, unless only replicas of the canary are up.
        """
        canaries = [replica for replica in ready if self._is_canary(replica)]
        others = [replica for replica in ready if not self._is_canary(replica)]
        if wish.canary and canaries and not self._canary.returned:
            return canaries
        if others or any(replica.up and not self._is_canary(replica) for replica in self._fitting(wish)):
            return others
        return canaries

    def _is_canary(self, replica: Replica) -> bool:
        return replica.model is not None and self._canary.serves(replica.model.identity)

    def outcome(self, model: ServedModel, seconds: float) -> None:
        """Records the seconds from the start of a call to its first token, which are infinite for a failed call.

        The record decides whether the canary (a new revision on trial) keeps its share of the requests.
        """
        reason = self._canary.record(model.identity, seconds)
        if reason is not None:
            logger.error("canary returned", extra={"canary": self.settings.canary, "reason": reason})
            self._queue.serve()

    def answered(self, place: Place, wish: Wish, cached_tokens: int) -> None:
        """Tells the router how many tokens of the wish's prompt the engine found in its cache."""
        if place.replica in self._in_router:
            self._router.answered(place.replica.address, wish.prompt, cached_tokens, time.monotonic())
