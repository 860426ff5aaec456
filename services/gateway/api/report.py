"""`/report`: the report on the served model, which an engine reads from the artifact store."""

import grpc
from fastapi import APIRouter, Response

from nanochat_core.protos import engine_pb2
from services.gateway.api.dependencies import PoolDep
from services.gateway.api.web_page import built_page
from services.gateway.errors import ERROR_RESPONSES, ApiError, from_rpc, shown

router = APIRouter(tags=["Operations"], responses=ERROR_RESPONSES)

# The timeout is long because the engine's artifact store may be far away.
_TIMEOUT_SECONDS = 20.0
# The gateway sends only files of these media types to a browser, whatever an engine sends.
_MEDIA_TYPES = {"text/markdown": "text/markdown; charset=utf-8", "image/png": "image/png"}


@router.get("/report", include_in_schema=False)
async def page(pool: PoolDep) -> Response:
    """Returns the page that shows the report. The page loads the files below `/report/`."""
    return built_page(pool.settings.static_dir, "report.html")


@router.get("/report/{file}", summary="The model's report", response_class=Response)
async def report_file(file: str, pool: PoolDep, model: str = "") -> Response:
    """Send a file of the report: `report.md` (Markdown) or one of its pictures. The headers `nanochat-model` and
    `nanochat-report-revision` name the model and the revision that the report describes. The header
    `nanochat-served-revision` names the revision that serves now."""
    replica, served = pool.pick(model)
    try:
        report = await replica.stub.GetReport(engine_pb2.GetReportRequest(file=file), timeout=_TIMEOUT_SECONDS)
    except grpc.aio.AioRpcError as error:
        raise _api_error(error) from error
    for each in report.files:
        if each.name == file and each.media_type in _MEDIA_TYPES:
            return Response(
                each.content,
                media_type=_MEDIA_TYPES[each.media_type],
                headers={
                    "Cache-Control": "no-cache",
                    "nanochat-model": report.model,
                    "nanochat-report-revision": report.revision,
                    "nanochat-served-revision": served.info.revision,
                },
            )
    raise _no_report(f"The report has no file {shown(file)!r}.")


def _api_error(error: grpc.aio.AioRpcError) -> ApiError:
    code = error.code()
    if code is grpc.StatusCode.NOT_FOUND:
        # The engine's error repeats the name of the file, which the client chose.
        return _no_report(f"There is no such report: {shown(error.details() or '')}.")
    if code is grpc.StatusCode.UNIMPLEMENTED:  # the answer of engines of earlier versions, which send no reports
        return _no_report("This engine is of an earlier version and sends no reports.")
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return ApiError(500, f"The report cannot be sent: {error.details()}.", code="report_too_large")
    return from_rpc(error, started=False)


def _no_report(message: str) -> ApiError:
    return ApiError(404, message, code="report_not_found")
