"""Spellings of one address meet, different ones don't; ids never change; draws are uniform."""

import hashlib
import os
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pairs.identity import canonical_url, held_out, local_key, make_uid, sha256_hex, unit_hash, url_key

SPELLINGS = [
    ("http://example.com/a.jpg", "HTTP://EXAMPLE.com:80/a.jpg"),
    ("https://example.com/", "https://example.com:443"),
    ("http://example.com/", "http://example.com:0080/#top"),
    ("http://example.com/", "http://example.com:/?"),
    ("http://example.com/~me/%2F", "http://example.com/%7eme/%2f"),
    ("http://example.com/?a=1&b=2", "http://example.com?b=2&a=1"),
    ("http://example.com/a%20b", " http://example.com/a b\n"),
    ("http://example.com/b", "http://example.com/a/../b"),
    ("http://münchen.de/ü?q=ä", "http://xn--mnchen-3ya.de/%C3%BC?q=%c3%a4"),
    ("http://[::1]/", "http://[::1]:80/"),
    ("http://[2001:DB8::1]:8080/x", "http://[2001:db8::1]:8080/x"),
    ("http://user:Pass@h.com/", "http://user:Pass@H.com:80/"),
]
DIFFERENT = [
    ("http://example.com/a", "https://example.com/a"),
    ("http://example.com/a", "http://example.com/A"),
    ("http://example.com/", "http://example.com:8080/"),
    ("http://example.com/", "http://example.com:443/"),
    ("http://example.com/?a=1", "http://example.com/"),
    ("http://example.com/?u=http%3A%2F%2Fb.com%3A80", "http://example.com/?u=http%3A%2F%2Fb.com"),
    ("http://user:80@h.com/", "http://user@h.com/"),
    ("http://example.com/a%2Fb", "http://example.com/a/b"),
    ("http://[::80]/", "http://[::]/"),
]


@pytest.mark.parametrize(("one", "other"), SPELLINGS)
def test_two_spellings_of_one_address_meet(one: str, other: str) -> None:
    assert canonical_url(one) == canonical_url(other)
    assert url_key(one) == url_key(other)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_addresses_stay_apart(one: str, other: str) -> None:
    assert url_key(one) != url_key(other)


def test_what_enters_the_key_is_readable() -> None:
    assert canonical_url("HTTP://Example.com:80/b/../%7ea?y=2&x=1#f") == "http://example.com/~a?x=1&y=2"
    assert canonical_url("http://u:p@h.com:80/x") == "http://u:p@h.com/x"
    assert canonical_url("http://[::1]:80/") == "http://[::1]/"


@pytest.mark.parametrize("url", ["http://[::1", "http://a.com:99999/", "http://a.com:abc/"])
def test_an_address_that_cannot_be_parsed_stands_for_itself(url: str) -> None:
    assert canonical_url(f" {url} ") == url
    assert url_key(url) != url_key("")


PIECES = [*"aZ09.:/?#&=;+ []@~\\-_%\t\n'\"|", "%2f", "%zz", "ü", "ß", "中", "\ud800"]
ODD = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
HOST = st.one_of(
    ODD,
    st.sampled_from(["a.com", "A.com:80", "[::1]", "[FE80::1%25en0]:443", "u:80@münchen.de", "ａ.com", "1.2.3.4:080"]),
)


@given(st.sampled_from(["http", "HTTPS", "ftp", ""]), HOST, ODD, ODD)
@example("http", "a.com:80", "\ud800", "")
def test_the_canonical_form_is_a_fixed_point(scheme: str, host: str, path: str, query: str) -> None:
    once = canonical_url(f"{scheme}://{host}/{path}?{query}")
    assert canonical_url(once) == once
    once.encode()  # no lone surrogates: Arrow and the network could not carry them


@given(st.text(max_size=30))
def test_no_text_makes_it_fail(text: str) -> None:
    assert canonical_url(canonical_url(text)) == canonical_url(text)
    assert len(url_key(text)) == 32


@given(st.from_regex(r"\A[a-z][a-z0-9]{0,8}\.(com|org)\Z"), st.lists(st.sampled_from("abcx"), max_size=4), st.randoms())
def test_case_of_the_host_and_order_of_the_query_do_not_matter(host: str, keys: list[str], random: object) -> None:
    query = [f"{key}={i}" for i, key in enumerate(keys)]
    shuffled = random.sample(query, len(query))  # type: ignore[attr-defined]
    assert url_key(f"http://{host}/p?{'&'.join(query)}") == url_key(f"http://{host.upper()}:80/p?{'&'.join(shuffled)}")
    assert urlsplit(canonical_url(f"http://{host}/p")).hostname == host


def test_golden_ids() -> None:
    """On disk for ever: a change here orphans every workspace."""
    key = url_key("http://example.com/a.jpg")
    assert key == hashlib.sha256(b"http://example.com/a.jpg").hexdigest()[:32] == "4fd63207a70baba7076795ee9c335785"
    assert local_key("stamps", "a/b.png") == hashlib.sha256(b"stamps:a/b.png").hexdigest()[:32]
    original = sha256_hex(b"image bytes")
    assert (
        make_uid(key, original)
        == hashlib.sha256((key + original).encode()).hexdigest()[:32]
        == "c829ff90a9554c8c1a710752ff947fbd"
    )
    assert unit_hash("seed", 1, "uid") == pytest.approx(0.5008663270106081, abs=1e-15)


def test_a_uid_hangs_on_the_address_and_on_the_bytes() -> None:
    uids = {make_uid(url_key(u), sha256_hex(b)) for u in ("http://a.com/1", "http://a.com/2") for b in (b"x", b"y")}
    assert len(uids) == 4
    assert make_uid(url_key("http://A.com:80/1"), sha256_hex(b"x")) in uids


def test_a_tenth_is_held_out_and_draws_are_uniform() -> None:
    uids = [make_uid(f"{i:032x}", "0" * 64) for i in range(20_000)]
    assert abs(sum(map(held_out, uids)) / len(uids) - 0.1) < 0.01  # 4.7 standard deviations
    draws = [unit_hash("crop", uid) for uid in uids]
    assert all(0 <= draw < 1 for draw in draws)
    tenths = [sum(i / 10 <= draw < (i + 1) / 10 for draw in draws) for i in range(10)]
    assert all(abs(count - 2000) < 200 for count in tenths)


def test_the_highest_digest_stays_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class AllOnes:
        def __init__(self, _: bytes) -> None: ...

        def digest(self) -> bytes:
            return b"\xff" * 32

    monkeypatch.setattr(hashlib, "sha256", AllOnes)
    assert unit_hash("x") < 1


def test_draws_do_not_depend_on_the_process() -> None:
    code = "from pairs.identity import *; print(unit_hash('a', 1), url_key('http://a.com'), held_out('ab' * 16))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": s},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for s in ("1", "2")
    }
    assert seen == {f"{unit_hash('a', 1)} {url_key('http://a.com')} {held_out('ab' * 16)}\n"}
