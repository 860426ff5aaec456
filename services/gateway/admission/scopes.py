"""Maps the path of a request to the scope (permission) that the request needs."""

from services.gateway.admission.keys import Scope

# The first matching prefix decides. All other paths are open to everyone, because the chat page, the documentation and
# the probes contain nothing that a key must protect.
_PREFIXES = (
    ("/v1/sandbox/", Scope.SANDBOX),
    ("/v1/lessons", Scope.ADMIN),
    ("/v1/", Scope.CHAT),
    ("/tokenize", Scope.CHAT),
    ("/detokenize", Scope.CHAT),
    ("/report/report.md", Scope.CHAT),  # a browser requests pictures without a key, so the report's pictures are open
    ("/progress", Scope.CHAT),
    ("/metrics", Scope.METRICS),
    ("/admin/", Scope.ADMIN),
)


def scope_of(path: str) -> Scope | None:
    """Returns the scope that a request to ``path`` needs; None if everyone may send such a request."""
    return next((scope for prefix, scope in _PREFIXES if path.startswith(prefix)), None)
