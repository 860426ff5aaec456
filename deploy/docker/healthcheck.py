"""Exit with 0 if a service is healthy, otherwise with 1.

Usage: ``healthcheck.py http://HOST:PORT/PATH`` or ``healthcheck.py grpc://HOST:PORT``. The HTTP request uses TLS
if the gateway has a certificate.
"""

import http.client
import os
import ssl
import sys
import urllib.parse

TIMEOUT_SECONDS = 3


def http_is_healthy(address: str, path: str) -> bool:
    """Whether the server at ``address`` answers a GET of ``path`` with 200."""
    if os.environ.get("NANOCHAT_GATEWAY_HTTPS_CERTIFICATE"):
        # The certificate is not verified, because it names the address that clients use, not this loopback address.
        context = ssl._create_unverified_context()  # noqa: S323
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            address, timeout=TIMEOUT_SECONDS, context=context
        )
    else:
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def grpc_is_serving(address: str) -> bool:
    """Whether the standard gRPC health service at ``address`` reports SERVING for the whole server."""
    import grpc  # not at the top: this import is slow, and a check over HTTP does not need it
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        try:
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS)
        except grpc.RpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    url = urllib.parse.urlsplit(sys.argv[1])
    healthy = grpc_is_serving(url.netloc) if url.scheme == "grpc" else http_is_healthy(url.netloc, url.path)
    sys.exit(not healthy)
