"""The gateway as an ASGI application: middleware, endpoints and error handlers."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from nanochat_core.discovery import addresses_of
from nanochat_core.lessons.lists import LessonLists
from nanochat_core.sandboxes import Sandboxes
from nanochat_core.store import open_store
from nanochat_core.tls import tls_files
from nanochat_core.tracing.tracer import Tracer
from services.gateway.admission.admission import Admission
from services.gateway.admission.grant import RATE_LIMIT_HEADERS
from services.gateway.admission.middleware import AdmissionMiddleware
from services.gateway.api import (
    admin,
    chat,
    completions,
    docs,
    lessons,
    models,
    probes,
    progress,
    report,
    sandbox,
    status,
    tokens,
)
from services.gateway.api.messages import endpoint as messages
from services.gateway.api.responses import endpoint as responses
from services.gateway.api.responses.kept import KeptResponses, MemoryValues
from services.gateway.api.responses.redis_values import RedisValues
from services.gateway.api.web_page import WebPage
from services.gateway.engines.channel import open_channel
from services.gateway.engines.pool import EnginePool, Lookup
from services.gateway.errors import on_http_error, on_validation_error
from services.gateway.metrics import Metrics
from services.gateway.middleware.body_limit import BodyLimit
from services.gateway.middleware.drain import Drain
from services.gateway.middleware.failures import Failures
from services.gateway.middleware.head import HeadRequests
from services.gateway.middleware.request_log import RequestLog
from services.gateway.middleware.security_headers import SecurityHeaders
from services.gateway.middleware.unread_body import UnreadBody
from services.gateway.settings import GatewaySettings

_DESCRIPTION = """A chat model behind OpenAI's API. Any OpenAI client works with this server's address and `/v1` as its
base URL. Answers in which the model ran Python carry `nanochat.tool_events`."""


def create_app(settings: GatewaySettings, lookup: Lookup = addresses_of) -> FastAPI:
    """Builds the application. It is connected to engines and sandboxes from its startup to its shutdown.

    ``lookup`` returns the addresses of a host name; the default asks the system's resolver. The application's
    ``state.drain`` and ``state.metrics`` exist from the beginning. Its ``state.pool`` and ``state.sandboxes`` exist
    after the startup.

    Raises UserError if the TLS files, the Redis URL, the file of the keys, the store of the lessons or the trace
    exporter of the settings cannot be used.
    """
    metrics = Metrics()
    tracer, tls = Tracer("gateway", settings, settings.trace_ratio), tls_files(settings)
    admission = Admission(settings, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        connect = functools.partial(open_channel, settings=settings, tls=tls)
        sandboxes = Sandboxes(settings.sandbox_addresses, tls, lookup_seconds=settings.discovery_seconds)
        async with (
            contextlib.aclosing(sandboxes) as app.state.sandboxes,
            contextlib.aclosing(admission),
            contextlib.aclosing(EnginePool(settings, metrics, connect, lookup)) as app.state.pool,
        ):
            await admission.start()
            yield
        await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="nanochat",
        version="1",
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        exception_handlers={HTTPException: on_http_error, RequestValidationError: on_validation_error},
    )
    app.state.drain, app.state.metrics, app.state.admission = Drain(), metrics, admission
    app.state.progress = progress.ProgressReader()
    app.state.lessons = open_store(settings.lessons_home) if settings.lessons_home else None
    app.state.lesson_lists = LessonLists(app.state.lessons) if app.state.lessons else None
    values = MemoryValues() if admission.redis is None else RedisValues(admission.redis)
    app.state.kept_responses = KeptResponses(values, settings.response_seconds, settings.max_body_bytes)
    for endpoints in (
        chat,
        completions,
        responses,
        messages,
        sandbox,
        models,
        tokens,
        lessons,
        admin,
        status,
        probes,
        progress,
        report,
        docs,
    ):
        app.include_router(endpoints.router)
    app.mount("/", WebPage(directory=settings.static_dir, html=True, check_dir=False))
    # A request passes the middleware in reverse order: the middleware that was added last comes first.
    app.add_middleware(BodyLimit, settings=settings, metrics=metrics)
    app.add_middleware(AdmissionMiddleware, admission=admission, metrics=metrics)
    app.add_middleware(HeadRequests)
    app.add_middleware(Failures)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "Retry-After", *RATE_LIMIT_HEADERS],
        )
    app.add_middleware(SecurityHeaders)
    app.add_middleware(RequestLog, metrics=metrics, tracer=tracer)
    app.add_middleware(UnreadBody)
    return app
