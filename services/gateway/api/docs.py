"""`/docs`: the OpenAPI document as a page that loads nothing from other servers."""

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

router = APIRouter()

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid #8886; padding-top: 1rem; }
code, pre { font: 0.9em/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; padding: 0.8rem; border: 1px solid #8886; border-radius: 0.4rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid #8883; }
"""


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Returns the page `/docs`, which is made from the same document as `/openapi.json`."""
    return HTMLResponse("".join(_page(request.app.openapi())))


@router.get("/docs/style.css", include_in_schema=False)
async def style() -> Response:
    """Returns the style of `/docs`. It is a separate file, because the security policy forbids styles in a page."""
    return Response(_STYLE, media_type="text/css")


def _page(spec: dict[str, Any]) -> Iterator[str]:
    title = escape(spec["info"]["title"])
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title} API</title>'
    yield '<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/docs/style.css">'
    yield f"<h1>{title} API</h1><p>{escape(spec['info']['description'])}</p>"
    yield '<p>The same text for programs: <a href="/openapi.json">/openapi.json</a>. <a href="/">The chat page.</a></p>'
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            yield from _operation(f"{method.upper()} {path}", operation, spec)
    yield "</html>"


def _operation(title: str, operation: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    yield f"<h2>{escape(operation['summary'])}</h2><p><code>{escape(title)}</code></p>"
    yield f"<p>{escape(operation.get('description', ''))}</p>"
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if body:
        # The schema of an optional body is a choice between an object and null. Only the object is described.
        schema = _resolve(next((each for each in body.get("anyOf", ()) if "$ref" in each), body), spec)
        yield from _parameters(schema, spec)
        yield f"<h3>Example request</h3>{_code(schema.get('example'))}"
    answer = next(answer for status, answer in operation["responses"].items() if status.startswith("2"))
    for media_type, content in answer.get("content", {}).items():
        if "example" in content:
            yield f"<h3>Example answer ({escape(media_type)})</h3>{_code(content['example'])}"


def _parameters(schema: dict[str, Any], spec: dict[str, Any]) -> Iterator[str]:
    yield "<table><tr><th>Parameter</th><th>Type</th><th>Meaning</th></tr>"
    for name, parameter in schema["properties"].items():
        note = parameter.get("description", "")
        if name in schema.get("required", ()):
            note = f"required. {note}"
        yield f"<tr><td><code>{escape(name)}</code></td>"
        yield f"<td>{escape(_type(parameter, spec))}</td><td>{escape(note)}</td></tr>"
    yield "</table>"


def _type(schema: dict[str, Any], spec: dict[str, Any]) -> str:
    if "$ref" in schema:
        return str(_resolve(schema, spec)["title"])
    if "anyOf" in schema:
        kinds = [_type(each, spec) for each in schema["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'], spec)}"
    return str(schema.get("type", "any"))


def _resolve(schema: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    resolved: dict[str, Any] = spec["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return resolved


def _code(example: Any) -> str:
    text = example if isinstance(example, str) else json.dumps(example, indent=2, ensure_ascii=False)
    return f"<pre>{escape(text)}</pre>"
