"""Answers a request on which the gateway itself failed."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.errors import internal_error
from services.gateway.middleware.request_log import RequestRecord

logger = logging.getLogger(__name__)


class Failures:
    """ASGI middleware that logs an error that nothing else has handled, and answers 500 if no answer has begun.

    Other middleware, such as CORS, adds its headers to this answer too.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = False

        async def send_observed(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._app(scope, receive, send_observed)
        except Exception:
            record: RequestRecord = scope["state"]["record"]
            logger.exception("request failed", extra={"request_id": record.request_id})
            error = internal_error(record.request_id)
            record.error = error.code
            if not began:
                await error.response()(scope, receive, send)
