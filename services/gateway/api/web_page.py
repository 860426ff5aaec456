"""The chat page: the files that the front-end build has written into a folder."""

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

# The name of each file in assets/ contains a hash of the content, so a file's content never changes.
_ASSET_CACHE = "public, max-age=31536000, immutable"
# The browser asks for each of the remaining files every time, and mostly gets the answer 304 (not modified).
_CACHE = "no-cache"


class WebPage(StaticFiles):
    """Serves the files of the folder. While there is no ``index.html``, serves a page with build instructions."""

    async def check_config(self) -> None:
        """Accepts a missing folder, because a later build may create it."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Returns the file at ``path``, or raises an HTTPException with status 404."""
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)  # the client wants an endpoint of the API that does not exist
        try:
            response = await super().get_response(path, scope)
        except HTTPException:
            if path == ".":
                return HTMLResponse(_NOT_BUILT, 404)
            raise
        response.headers["Cache-Control"] = _ASSET_CACHE if path.startswith("assets/") else _CACHE
        return response
