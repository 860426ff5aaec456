"""Serves the web pages: the files that the front-end build has written into a folder."""

import os
from pathlib import Path

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from services.gateway.errors import ApiError

_NOT_BUILT = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>nanochat</title>
<h1>The chat page is not built</h1>
<p>The API works without it; it is described at <a href="/docs">/docs</a>.</p>
<p>To build the page, run <code>npm ci</code> and <code>npm run build</code> in <code>services/gateway/web</code>,
then load this address again.</p>
</html>
"""

# Browsers may keep the files in assets/ for a year: the name of each file contains a hash of the content, so the
# content of a name never changes.
_ASSET_CACHE = "public, max-age=31536000, immutable"
# For each other file, the browser asks every time whether it has changed. The usual answer is 304 (not modified).
_CACHE = "no-cache"
# Beside a file, the build may write compressed copies with these endings. The gateway sends the first copy whose coding
# the browser accepts.
_CODINGS = {"br": ".br", "gzip": ".gz"}
# Methods that endpoints of the API may have. HEAD is not listed, because middleware answers it wherever there is GET.
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


def built_page(folder: str, name: str) -> Response:
    """Returns the response of an endpoint that serves a page of the build, such as ``report.html``.

    Raises:
        ApiError: 404 if the web page is not built.
    """
    path = Path(folder, name)
    if not path.is_file():
        raise ApiError(404, "The web page is not built; the API works without it, see /docs.", code="not_built")
    return FileResponse(path, media_type="text/html", headers={"Cache-Control": _CACHE})


class WebPage(StaticFiles):
    """Serves the files of the front-end build. If the build has written a compressed copy of a file, and the browser
    accepts its coding, the copy is sent."""

    async def check_config(self) -> None:
        """Accepts a missing folder, because a later build may create it."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Returns the file at ``path``, or raises an HTTPException with status 404 or 405.

        While there is no ``index.html``, the path of the chat page returns build instructions with status 404.
        """
        if scope["method"] not in ("GET", "HEAD"):
            raise _no_endpoint(path, scope, file=self.lookup_path(path)[1] is not None)
        try:
            response = await super().get_response(path, scope)
        except HTTPException as error:
            if path == ".":
                return HTMLResponse(_NOT_BUILT, 404)
            raise _no_endpoint(path, scope, file=False) from error
        response.headers["Cache-Control"] = _ASSET_CACHE if path.startswith("assets/") else _CACHE
        return response

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """Returns a file or its compressed copy, or 304 if the browser has the file already."""
        for coding in _accepted(scope):
            compressed = f"{os.fspath(full_path)}{_CODINGS[coding]}"
            try:
                stat_of_compressed = os.stat(compressed)
            except OSError:
                continue
            response = super().file_response(compressed, stat_of_compressed, scope, status_code)
            response.headers["Content-Encoding"] = coding
            break
        else:
            response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["Vary"] = "Accept-Encoding"
        return response


def _accepted(scope: Scope) -> list[str]:
    """Returns the codings of compressed files that the client accepts, the best first (RFC 9110, section 12.5.3)."""
    offers = {}
    for part in Headers(scope=scope).get("accept-encoding", "").split(","):
        name, _, weight = part.partition(";")
        offers[name.strip().lower()] = weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return [coding for coding in _CODINGS if offers.get(coding)]


def _no_endpoint(path: str, scope: Scope, *, file: bool) -> HTTPException:
    """Returns the error for a request that no endpoint serves: 405 if the path exists with other methods, else 404.

    ``file`` says whether the folder has a file at the path. A request whose path belongs to an endpoint with other
    methods also reaches :class:`WebPage`, because that class is mounted for every path.
    """
    allowed = {"GET"} if file or path == "." else set()
    for route in scope["app"].routes:
        for method in _METHODS if not isinstance(route, Mount) else ():
            if route.matches({**scope, "method": method})[0] is Match.FULL:
                allowed.add(method)
    if not allowed:
        return HTTPException(404)
    return HTTPException(405, headers={"Allow": ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))})
