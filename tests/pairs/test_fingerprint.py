"""A fingerprint hangs on content and settings, on nothing else, and on all of them."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairs.errors import PairmillError
from pairs.fingerprint import content_hash, fingerprint

LEAF = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
TREE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
PARTS = st.dictionaries(st.text(max_size=4), TREE, max_size=5)


@given(PARTS, st.randoms(use_true_random=False))
def test_order_of_keys_does_not_matter(parts: dict[str, object], random: object) -> None:
    keys = list(parts)
    random.shuffle(keys)  # type: ignore[attr-defined]
    made = fingerprint(parts)
    assert fingerprint({key: parts[key] for key in keys}) == made
    assert len(made) == 12 and set(made) <= set("0123456789abcdef")
    assert fingerprint({**parts, "another": 1}) != made


@pytest.mark.parametrize(
    ("one", "other"),
    [({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), ({"a": True}, {"a": 1}), ({"a": None}, {}),
     ({"a": [1, 2]}, {"a": [2, 1]}),
     ({"a": "1"}, {"a": 1}), ({"a": {"b": 1}}, {"a": 1, "b": 1}), ({"a": 0.1}, {"a": 0.1 + 1e-16})],
)  # fmt: skip
def test_every_part_matters(one: dict[str, object], other: dict[str, object]) -> None:
    assert fingerprint(one) != fingerprint(other)


def test_golden_and_plain_kinds() -> None:
    assert fingerprint({"version": 1, "name": "clip", "size": 0.25}) == "cce8a22b4461"
    assert fingerprint({"a": (1, 2)}) == fingerprint({"a": [1, 2]})
    assert (
        fingerprint({"a": {"x", "y", "z"}})
        == fingerprint({"a": frozenset("zyx")})
        == fingerprint({"a": ["x", "y", "z"]})
    )
    assert fingerprint({"a": Path("x/y")}) == fingerprint({"a": "x/y"})


def test_what_has_no_plain_form_is_a_bug() -> None:
    with pytest.raises(TypeError, match="cannot enter a fingerprint"):
        fingerprint({"a": object()})
    with pytest.raises(ValueError, match="JSON compliant"):
        fingerprint({"a": float("nan")})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_bytes(b"{}")
    (root / "sub" / "weights").write_bytes(bytes(1000))
    return root


def test_a_byte_a_name_or_a_file_more_changes_it(folder: Path) -> None:
    seen = [content_hash(folder)]
    (folder / "sub" / "weights").write_bytes(bytes(999) + b"\x01")
    seen.append(content_hash(folder))
    (folder / "sub" / "weights").rename(folder / "sub" / "weights2")
    seen.append(content_hash(folder))
    (folder / "sub" / "weights2").rename(folder / "weights2")
    seen.append(content_hash(folder))
    (folder / "empty").write_bytes(b"")
    seen.append(content_hash(folder))
    assert len(set(seen)) == 5
    (folder / "config.json").write_bytes(b"[]")
    (folder / "empty").write_bytes(b"{}")
    assert content_hash(folder) not in seen


def test_place_time_and_mode_do_not_matter(folder: Path, tmp_path: Path) -> None:
    before = content_hash(folder)
    os.utime(folder / "config.json", (1, 1))
    (folder / "config.json").chmod(0o600)
    (folder / "nothing inside").mkdir()
    folder.rename(tmp_path / "elsewhere")
    assert content_hash(tmp_path / "elsewhere") == before
    copy = tmp_path / "copy"
    (copy / "sub").mkdir(parents=True)
    for name in ("sub/weights", "config.json"):  # made in another order
        (copy / name).write_bytes((tmp_path / "elsewhere" / name).read_bytes())
    assert content_hash(copy) == before


def test_a_file_has_the_plain_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert content_hash(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_name_cannot_play_another_file(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    (one / "a").write_bytes(b"1")
    (one / "b").write_bytes(b"2")
    (other / f"a {content_hash(one / 'a')}\nb").write_bytes(b"2")
    assert content_hash(one) != content_hash(other)


def test_links_count_as_the_files_they_lead_to(folder: Path, tmp_path: Path) -> None:
    """A model hub's cache is a folder of links: other blobs have to give another hash."""
    cache = tmp_path / "cache"
    (cache / "sub").mkdir(parents=True)
    for name in ("config.json", "sub/weights"):
        (cache / name).symlink_to(folder / name)
    assert content_hash(cache) == content_hash(folder)
    before = content_hash(cache)
    (folder / "sub" / "weights").write_bytes(b"other")
    assert content_hash(cache) != before
    (tmp_path / "link").symlink_to(folder)
    assert content_hash(tmp_path / "link") == content_hash(folder)


def test_what_cannot_be_hashed_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PairmillError, match="a file or a folder at"):
        content_hash(tmp_path / "misspelt")
    (folder / "more").symlink_to(folder / "sub")
    with pytest.raises(PairmillError, match="more, a link to"):
        content_hash(folder)
    (folder / "more").unlink()
    (folder / "more").symlink_to(tmp_path / "gone")
    with pytest.raises(PairmillError, match="more, a link to"):
        content_hash(folder)
