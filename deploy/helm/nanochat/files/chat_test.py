"""Ask the chat service one question and fail if the answer is wrong or empty.

Usage: ``chat_test.py URL PROMPT EXPECTED_TEXT``. The environment variable ``API_KEY`` may contain an API key.
"""

import http.client
import json
import os
import ssl
import sys
import time
import urllib.parse
from typing import Any

TIMEOUT_SECONDS = 120


def connect(address: str) -> http.client.HTTPConnection:
    """Open a connection. The certificate is not verified, because it names the gateway's public address."""
    url = urllib.parse.urlsplit(address)
    if url.scheme == "https":
        context = ssl._create_unverified_context()  # noqa: S323 - the connection stays in the cluster
        return http.client.HTTPSConnection(url.netloc, timeout=TIMEOUT_SECONDS, context=context)
    return http.client.HTTPConnection(url.netloc, timeout=TIMEOUT_SECONDS)


def call(address: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Send one request and return the JSON answer. If the server reports an error, exit with the server's message."""
    connection = connect(address)
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    connection.request(method, path, json.dumps(body) if body else None, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.status != http.client.OK:
        sys.exit(f"{method} {path}: {response.status} {text}")
    return json.loads(text)


def main() -> None:
    address, prompt, expected = sys.argv[1:]
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (models := call(address, "GET", "/v1/models")["data"]):
        if time.monotonic() > deadline:
            sys.exit(f"no engine served a model within {TIMEOUT_SECONDS} seconds")
        time.sleep(1)
    model = models[0]["id"]
    question = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 200}
    message = call(address, "POST", "/v1/chat/completions", question)["choices"][0]["message"]
    print(json.dumps({"model": model, "prompt": prompt, "message": message}))
    if not message["content"] or expected not in message["content"]:
        sys.exit(f"the answer lacks {expected!r}" if expected else "the answer is empty")


main()
