"""The chat page: files that the front-end build left in a folder."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

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

# The build puts a hash of the content into these files' names, so a name's content never changes.
_HASHED = "assets/"
_HASHED_CACHE = "public, max-age=31536000, immutable"
# Asked for each time, answered with 304 mostly.
_CACHE = "no-cache"


class WebPage(StaticFiles):
    """Serves the folder; a page of its own while the folder has no ``index.html``."""

    def __init__(self, directory: str) -> None:
        super().__init__(directory=directory, html=True, check_dir=False)

    async def check_config(self) -> None:
        """The folder may appear later."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file at ``path``.

        Raises:
            HTTPException: 404, no such file, or not a request for one.
        """
        if scope["method"] not in ("GET", "HEAD"):
            # To a client of the API this is an unknown endpoint.
            raise HTTPException(404)
        try:
            response = await super().get_response(path, scope)
        except HTTPException:
            if path == ".":
                return HTMLResponse(_NOT_BUILT, 404)
            raise
        response.headers["Cache-Control"] = _HASHED_CACHE if path.startswith(_HASHED) else _CACHE
        return response
