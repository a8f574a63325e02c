"""Who a pair is, and every draw of chance that hangs on it.

`url_key` is known before anything is fetched; `uid` once the image's original bytes are. Texts,
resizing and encoding enter neither, so they survive a change of settings. Random choices (held-out
tenth, crops, which text) are hashes of the uid, never a generator's state: they are the same on any
worker, in any order.
"""

import hashlib

from w3lib.url import canonicalize_url

ID_LENGTH = 32  # hex digits of 128 bits
HELD_OUT_FRACTION = 0.1


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:ID_LENGTH]


def sha256_hex(data: bytes | memoryview) -> str:
    """sha256 of `data`, 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def canonical_url(url: str) -> str:
    """The form under which two spellings of one address meet: host in lower case, default port and
    fragment dropped, percent-encoding normalised, query sorted. An address that can't be parsed stands for
    itself: it becomes a candidate, and its failure is counted like any other."""
    url = url.strip().encode("utf-8", "replace").decode()
    try:
        canonical = canonicalize_url(url)
    except ValueError:
        return url
    scheme, _, rest = canonical.partition("://")
    host, slash, path = rest.partition("/")
    default_port = {"http": ":80", "https": ":443"}.get(scheme.lower())
    if default_port and host.endswith(default_port):
        host = host[: -len(default_port)]
    return f"{scheme}://{host}{slash}{path}" if rest else canonical


def url_key(url: str) -> str:
    """First 128 bits of sha256 over the canonical URL, 32 hex digits. Keys candidates and the ledger."""
    return _digest(canonical_url(url))


def local_key(source: str, relative_path: str) -> str:
    """The `url_key` of a local file: over `<source>:<relative path>`."""
    return _digest(f"{source}:{relative_path}")


def make_uid(key: str, original_sha256: str) -> str:
    """First 128 bits of sha256 over the url_key and the sha256 of the original image bytes."""
    return _digest(key + original_sha256)


def unit_hash(*parts: object) -> float:
    """A uniform draw in [0, 1) that depends on `parts` alone (their `str`)."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53  # 53 bits: 64 could round up to 1.0


def held_out(uid: str) -> bool:
    """Whether a trusted pair belongs to the tenth that only evaluates."""
    return unit_hash("held-out", uid) < HELD_OUT_FRACTION
