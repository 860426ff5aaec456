"""Checks a request's key and, if the request counts, the limits on requests and parallel answers.

Both checks come before the request's body is read. The tokens are charged later, when the length of the prompt is
known. Only a caller in debt, whose earlier answers exceeded the limit on tokens, is refused here already.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.gateway.admission.admission import Admission
from services.gateway.admission.grant import Grant
from services.gateway.admission.keys import Scope as KeyScope
from services.gateway.admission.scopes import scope_of
from services.gateway.errors import ApiError
from services.gateway.metrics import Metrics
from services.gateway.middleware.request_log import RequestRecord


class AdmissionMiddleware:
    """ASGI middleware that answers 401, 403, 429 or 503 to requests that the gateway does not accept.

    If the path needs a permission (a scope of a key), the ASGI scope's ``["state"]["caller"]`` becomes the
    :class:`Caller`. For a POST request to the model, its tokenizer or the sandbox, ``["state"]["grant"]`` becomes the
    :class:`Grant`.
    """

    def __init__(self, app: ASGIApp, admission: Admission, metrics: Metrics) -> None:
        self._app = app
        self._admission = admission
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = scope_of(scope["path"]) if scope["type"] == "http" else None
        if needed is None:
            await self._app(scope, receive, send)
            return
        record: RequestRecord = scope["state"]["record"]
        address = scope["client"][0] if scope.get("client") else ""
        try:
            caller = await self._admission.enter(Headers(scope=scope), address, needed)
            record.key = caller.key
            scope["state"]["caller"] = caller
            # Requests that only read are cheap, so they do not count against the limits.
            counted = needed in (KeyScope.CHAT, KeyScope.SANDBOX) and scope["method"] == "POST"
            grant = await self._admission.begin(caller) if counted else None
        except ApiError as error:
            record.error = error.code
            self._count(record)
            await error.response()(scope, receive, send)
            return
        if grant is None:
            await self._app(scope, receive, send)
        else:
            await self._serve(scope, receive, send, grant, record)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, grant: Grant, record: RequestRecord) -> None:
        async def finish() -> None:
            refused = record.error == "rate_limit_exceeded"
            await self._admission.finish(grant, record.prompt_tokens, record.completion_tokens, refused=refused)

        async def send_observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(grant.headers())
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                # The client may send its next request as soon as the response's end arrives. So the tokens of this
                # request are counted before the end is sent.
                await finish()
            await send(message)

        scope["state"]["grant"] = grant
        try:
            await self._app(scope, receive, send_observed)
        finally:
            await finish()
            # The two errors below mean that Grant.charge(), or an engine's limit on one caller, has refused the
            # request. This refusal is counted here.
            if record.error in ("rate_limit_exceeded", "admission_unavailable"):
                self._count(record)

    def _count(self, record: RequestRecord) -> None:
        self._metrics.admission_refusals.labels(str(record.error)).inc()
