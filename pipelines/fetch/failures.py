"""What can go wrong with a request: a class, and a stable reason that the ledger keeps."""

import socket
import ssl
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Literal, NamedTuple

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy

from pairs.identity import unit_hash
from pipelines.fetch.guard import EgressRefused

BACK_OFF_S, BACK_OFF_MAX_S = 0.5, 8.0
RETRY_AFTER_MAX_S = 30 * 86400.0  # of whatever date a server names
RETRY_STATUS = frozenset({408, 425, 429})

Headers = CIMultiDictProxy[str]
NO_HEADERS: Headers = CIMultiDictProxy(CIMultiDict())


class Failure(NamedTuple):
    """`transient` may succeed later, `permanent` won't, `refused` is ours or the site's decision."""

    status: Literal["transient", "permanent", "refused"]
    reason: str
    http_status: int | None = None
    retry_after_s: float | None = None


def bad_status(answer: aiohttp.ClientResponse) -> Failure | None:
    if answer.status == 200:
        return None
    later = answer.status in RETRY_STATUS or answer.status >= 500
    wait = retry_after(answer.headers) if later else None
    return Failure("transient" if later else "permanent", f"http_{answer.status}", answer.status, wait)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of a Retry-After header, as a number or as a date, `RETRY_AFTER_MAX_S` at most."""
    value = headers.get("Retry-After", "").strip()
    if value.isdecimal() and len(value) < 9:
        return min(float(value), RETRY_AFTER_MAX_S)
    try:
        wait_s = parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, wait_s), RETRY_AFTER_MAX_S)


def pause(failure: Failure, url: str, attempt: int) -> float:
    """Seconds before the next attempt: what the server asked for, or an exponential back-off with jitter."""
    jitter = 0.5 + unit_hash("back-off", url, attempt)
    return max(failure.retry_after_s or 0.0, min(BACK_OFF_MAX_S, BACK_OFF_S * 2 ** (attempt - 1)) * jitter)


def classify(error: Exception) -> Failure:
    """The class and reason of what a request raised; the first kind that fits."""
    if isinstance(error, EgressRefused):
        return Failure("refused", error.reason)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        gone = isinstance(error.os_error, socket.gaierror) and error.os_error.errno == socket.EAI_NONAME
        return Failure("permanent", "no_such_host") if gone else Failure("transient", "dns")
    for kind, failure in KINDS:
        if isinstance(error, kind):
            return failure
    raise error


KINDS: list[tuple[type[Exception] | tuple[type[Exception], ...], Failure]] = [
    (aiohttp.ConnectionTimeoutError, Failure("transient", "connect_timeout")),
    (TimeoutError, Failure("transient", "deadline")),
    (aiohttp.ClientConnectorCertificateError, Failure("permanent", "certificate")),
    ((aiohttp.ClientSSLError, ssl.SSLError), Failure("transient", "tls")),
    (aiohttp.ClientConnectorError, Failure("transient", "connect")),
    ((aiohttp.InvalidURL, ValueError), Failure("permanent", "bad_url")),
    (aiohttp.ContentTypeError, Failure("permanent", "bad_response")),
    (aiohttp.ClientPayloadError, Failure("transient", "cut_body")),
    (aiohttp.ServerDisconnectedError, Failure("transient", "disconnected")),
    (aiohttp.ClientResponseError, Failure("permanent", "bad_response")),
    ((aiohttp.ClientError, OSError), Failure("transient", "connection")),
]
