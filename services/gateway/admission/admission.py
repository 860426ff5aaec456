"""Decides which requests the gateway accepts, and counts them against the limits of their callers."""

import asyncio
import contextlib
import logging
import time
import uuid

from starlette.datastructures import Headers

from services.gateway.admission.away import Away
from services.gateway.admission.caller import Caller, Callers
from services.gateway.admission.file_store import FileStore
from services.gateway.admission.grant import Grant
from services.gateway.admission.keyring import Keyring
from services.gateway.admission.keys import Limits, Scope, parse_scopes
from services.gateway.admission.limiter import LEASE_SECONDS, Limiter, LocalLimiter
from services.gateway.admission.redis_limiter import RedisLimiter
from services.gateway.admission.redis_link import RedisLink
from services.gateway.admission.redis_store import RedisStore
from services.gateway.admission.store import KeyStore, MemoryStore
from services.gateway.admission.usage import Usage, day_of
from services.gateway.admission.usage_book import UsageBook
from services.gateway.errors import ApiError, not_allowed
from services.gateway.metrics import Metrics
from services.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0
_RENEW_SECONDS = LEASE_SECONDS / 3
# When the gateway stops, it tries for this long to write the usage to the store.
_CLOSE_SECONDS = 3.0
_CLOSE_PAUSE_SECONDS = 0.2


class Admission:
    """The keys, limits and usage of one gateway.

    Attributes:
        redis: the connection to the Redis server that all gateways share; None if the settings name no Redis server.
        store: the store of keys and usage.
        keyring: the keys in memory.
        usage: requests and tokens of each key, including those that are not in the store yet.
    """

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        """Opens no connection yet. Raises UserError if the Redis URL or the file of the keys cannot be used."""
        self._metrics = metrics
        self.redis: RedisLink | None = None
        self.store: KeyStore = MemoryStore()
        self._limiters: list[Limiter] = [LocalLimiter()]
        if settings.redis_url:
            metrics.redis_up.set(1)
            self.redis = RedisLink(settings.redis_url, settings.redis_timeout_seconds, metrics.redis_up.set)
            self.store = RedisStore(self.redis)
            shared = RedisLimiter(self.redis)
            self._limiters = [shared] if settings.redis_failure == "closed" else [shared, *self._limiters]
        elif settings.keys_file:
            self.store = FileStore(settings.keys_file)
        self.keyring = Keyring(self.store)
        self.usage = UsageBook(self.store)
        limits = Limits(settings.requests_per_minute, settings.tokens_per_minute, settings.parallel_answers)
        self._callers = Callers(self.keyring, parse_scopes(settings.anonymous_scopes), limits)
        self._closes = settings.redis_failure == "closed"
        self._running: set[Grant] = set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Reads the keys, and starts the tasks that refresh the keys, write the usage and renew leases.

        In Redis, a running answer counts only as long as this gateway renews the answer's lease. :meth:`aclose` ends
        the tasks.
        """
        await self.keyring.refresh()
        self._tasks = [asyncio.create_task(task) for task in (self.keyring.watch(), self._flush(), self._renew())]
        for task in self._tasks:
            task.add_done_callback(_report)

    async def aclose(self) -> None:
        """Ends the tasks, writes the usage to the store, and closes the store.

        If the store does not accept the usage within a few seconds, the usage is lost.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                while not await self.usage.flush():
                    await asyncio.sleep(_CLOSE_PAUSE_SECONDS)
        except TimeoutError:
            logger.warning("usage is lost, because the store did not accept it before the gateway ended")
        await self.store.aclose()

    async def enter(self, headers: Headers, address: str, scope: Scope) -> Caller:
        """Returns the caller of a request to a path that needs ``scope``.

        Raises ApiError: 401 if the key is missing, wrong, revoked or expired, 403 if the caller lacks the scope, 503 if
        the key cannot be checked.
        """
        # While the store does not answer, a known key can still read the metrics, because they show this failure.
        need_fresh = self._closes and scope is not Scope.METRICS
        caller = await self._callers.identify(headers, address, need_fresh=need_fresh)
        if scope not in caller.scopes:
            raise not_allowed(scope)
        return caller

    async def begin(self, caller: Caller) -> Grant:
        """Counts a request against the caller's limits. If a limit refuses the request, adds the refusal to the usage.

        Raises ApiError: 429 if a limit has no room, 503 if no limiter answers.
        """
        grant = Grant(caller, self._limiters, uuid.uuid4().hex)
        try:
            await grant.begin()
        except ApiError as error:
            if error.status_code == 429:
                self.usage.add(day_of(time.time()), caller.key, Usage(refused=1))
            raise
        self._running.add(grant)
        return grant

    async def finish(self, grant: Grant, prompt_tokens: int, completion_tokens: int, *, refused: bool) -> None:
        """Replaces the request's reserved tokens by its used tokens, and adds the request and its tokens to the usage.

        Later calls for the same request do nothing. ``refused`` says whether a limit on the caller, such as the limit
        on tokens, refused the request after :meth:`begin`.
        """
        self._running.discard(grant)
        if not await grant.finish(prompt_tokens + completion_tokens):
            return
        key = grant.caller.key
        used = Usage(int(not refused), int(refused), prompt_tokens, completion_tokens)
        self.usage.add(day_of(time.time()), key, used)
        self._metrics.key_requests.labels(key).inc(used.requests)
        self._metrics.key_tokens.labels(key, "prompt").inc(prompt_tokens)
        self._metrics.key_tokens.labels(key, "completion").inc(completion_tokens)

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            await self.usage.flush()

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(_RENEW_SECONDS)
            limiter = self._limiters[0]
            # Requests of which Redis has counted nothing are left out, because Redis has no lease to renew. They came
            # while Redis did not answer, so only this process counts them.
            limited = [g for g in self._running if g.caller.limits.answers and g.is_counted_by(limiter)]
            with contextlib.suppress(Away):
                await limiter.renew((grant.caller.id, grant.answer) for grant in limited)
                for grant in limited:
                    if grant not in self._running:  # the answer has ended, but renew() may have added its lease again
                        await limiter.settle(grant.caller.id, grant.caller.limits, 0, grant.answer)


def _report(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical("the task that refreshes keys, usage or leases has failed", exc_info=task.exception())
