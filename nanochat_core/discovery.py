"""Looks up the replicas of a service: each address of the service's host names is one replica.

A host name may have many addresses, for example the name of a headless Service in Kubernetes, or of a service that
Compose runs several times. Names are looked up again every few seconds, so replicas may join and leave while the
process runs.
"""

import asyncio
import dataclasses
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Sequence

from nanochat_core.daemon_threads import run_in_daemon_thread
from nanochat_core.errors import UserError

log = logging.getLogger(__name__)

LOOKUP_SECONDS = 2.0
"""Usual time between two lookups. More frequent lookups would hardly find changes earlier, because the name server of a
cluster keeps its answers for about five seconds."""

# Time limit of a lookup. All names are looked up together, so a name without an answer delays all other addresses.
_TIMEOUT_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One replica.

    Attributes:
        address: numeric host and port to connect to, such as ``10.0.0.7:50051`` or ``[fd00::7]:50051``.
        host: the host as written in the settings. A certificate of the replica must be valid for this name.
    """

    address: str
    host: str


def split_target(target: str) -> tuple[str, int]:
    """Split ``host:port``, where the host is a name, an IPv4 address or an IPv6 address in brackets.

    Raises UserError if the target has another form.
    """
    host, _, port = target.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{target!r} is not an address; write host:port, such as engine:50051 or [::1]:50051")
    return host, int(port)


def addresses_of(host: str) -> list[str]:
    """All numeric addresses of a host, by the system's resolver. Blocks until the name server answers.

    If a name has IPv4 and IPv6 addresses, only the IPv4 addresses are returned, because both kinds belong to the same
    replicas. Raises OSError if the name has no address or cannot be looked up.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    first = [info for info in found if info[0] == socket.AF_INET] or found
    return sorted({str(info[4][0]) for info in first})


async def watch_endpoints(
    targets: Sequence[str],
    on_change: Callable[[tuple[Endpoint, ...]], None],
    seconds: float = LOOKUP_SECONDS,
    lookup: Callable[[str], Iterable[str]] = addresses_of,
) -> None:
    """Look up the endpoints of ``targets`` again and again until canceled, or once if no target has a name.

    If the lookup of a name fails, its last known addresses stay in use, and a warning is logged. Further failures are
    not logged until a lookup of this name has succeeded. If several targets have the same address and port, their
    endpoint appears once, with the host of the first of these targets.

    Args:
        targets: texts of the form ``host:port``; a host that is an IP address is not looked up.
        on_change: called with the endpoints after the first lookups (even if there are no endpoints), and after each
            change. If ``on_change`` raises an exception, the exception is logged, and ``on_change`` is called again
            after the next lookups.
        seconds: time between two lookups.
        lookup: returns the addresses of a name or raises OSError; called on a separate thread.

    Raises:
        UserError: a target is not ``host:port``.
    """
    pairs = [split_target(target) for target in targets]
    known: dict[str, list[str]] = {host: [host] if _is_address(host) else [] for host, _ in pairs}
    names = [host for host, addresses in known.items() if not addresses]
    failing: set[str] = set()

    async def refresh(name: str) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_SECONDS):
                known[name] = list(await run_in_daemon_thread(lookup, name))
            failing.discard(name)
        except Exception as error:
            if name not in failing:
                reason = str(error) or "the name server does not answer"
                # Three errors are expected: OSError, which includes TimeoutError; UnicodeError, for an impossible name;
                # and RuntimeError, if a thread cannot start. Any other error is a mistake in the code, so its traceback
                # is logged.
                unexpected = not isinstance(error, OSError | UnicodeError | RuntimeError)
                facts = {"host": name, "reason": reason, "kept": known[name]}
                log.warning("lookup failed", exc_info=unexpected, extra=facts)
            failing.add(name)

    last: tuple[Endpoint, ...] | None = None
    while True:
        await asyncio.gather(*map(refresh, names))
        found = {_join(address, port): host for host, port in reversed(pairs) for address in known[host]}
        current = tuple(sorted((Endpoint(*item) for item in found.items()), key=lambda endpoint: endpoint.address))
        if current != last:
            try:
                on_change(current)
                last = current
            except Exception:
                log.exception("change of endpoints failed", extra={"addresses": [each.address for each in current]})
        if not names and current == last:
            return  # all targets are IP addresses, which do not change
        await asyncio.sleep(seconds)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _join(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
