"""A sound workspace is ok; each kind of damage is named with the path of what is damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pairs.schemas import LEDGER, PAIRS
from pairs.shard import ShardRef, read_shard, write_shard
from pairs.store import Store, table_metadata
from pairs.tar import TarWriter
from pairs.verify import verify
from pairs.workspace import Workspace
from tests.pairs.small import FOLDER, GROUP, fill, image, pair_row

PAIR = ShardRef(FOLDER, 0)
SCORES = f"scores/text_stats-aaaaaaaaaaaa/{GROUP}/0000/00000.parquet"
TRAINED = ShardRef(f"shards/small-bbbbbbbbbbbb/{GROUP}/0000", 0)
SELECTION = f"selections/small-bbbbbbbbbbbb/{GROUP}/0000/00000.parquet"
CANDIDATES = "candidates/web/0000/part-00000.parquet"
LEDGER_PART = f"ledger/{GROUP}/0000/00001.parquet"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "workspace"
    fill(Workspace.open(folder, create=True))
    return folder


@pytest.fixture
def sound(original: Path, tmp_path: Path) -> Workspace:
    """A copy of its own for each test to damage."""
    return Workspace.open(shutil.copytree(original, tmp_path / "workspace"))


def flip(store: Store, path: str, place: int) -> None:
    data = bytearray(store.read(path))
    data[place] ^= 1
    store.write(path, bytes(data))


def change(store: Store, path: str, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Rewrites a table's rows, its metadata as before."""
    table = store.read_table(path)
    rows = table.to_pylist()
    change(rows)
    store.write_table(path, pa.Table.from_pylist(rows, schema=table.schema), table_metadata(table))


def swap(rows: list[Any]) -> None:
    rows[0], rows[1] = rows[1], rows[0]


def set_first(name: str, value: object) -> Callable[[list[dict[str, Any]]], object]:
    return lambda rows: rows[0].update({name: value})


def rewrite_tar(store: Store, members: list[tuple[str, str, bytes]]) -> None:
    """Another tar, recorded as if it were the right one: only its members can tell."""
    with store.writing(PAIR.tar) as file:
        writer = TarWriter(file)
        for key, ext, data in members:
            writer.add(key, ext, data)
        writer.close()
    table = store.read_table(PAIR.table)
    facts = table_metadata(table) | {"tar_size": str(writer.size), "tar_sha256": writer.sha256}
    store.write_table(PAIR.table, table, facts)


def members(store: Store) -> list[tuple[str, str, bytes]]:
    shard = read_shard(store, PAIR)
    found = []
    for row in shard.table.to_pylist():
        for name, ext in (("image", row["image_ext"]), ("text", "txt"), ("json", "json")):
            start = row[f"{name}_offset"]
            found.append((row["uid"], ext, shard.tar[start : start + row[f"{name}_size"]]))
    return found


def another_json(store: Store) -> None:
    one, two, (key, ext, data), *rest = members(store)
    rewrite_tar(store, [one, two, (key, ext, data.replace(key.encode(), b"0" * 32)), *rest])


def another_extension(store: Store) -> None:
    (key, _, data), *rest = members(store)
    rewrite_tar(store, [(key, "png", data), *rest])


def another_text(store: Store) -> None:
    one, (key, ext, data), *rest = members(store)
    rewrite_tar(store, [one, (key, ext, data.replace(b"dog", b"cat")), *rest])


def broken_json(store: Store) -> None:
    one, two, (key, ext, data), *rest = members(store)
    rewrite_tar(store, [one, two, (key, ext, b"[" + data[1:]), *rest])


def model_file(store: Store) -> str:
    return next(path for path in store.files("models") if path.endswith("model.safetensors"))


def ledger_row_without_candidate(store: Store) -> None:
    row = {"url_key": "f" * 32, "url": "http://x.test/", "status": "ok"}
    store.write_table(LEDGER_PART.replace("00001", "00009"), pa.Table.from_pylist([row], schema=LEDGER))


def not_ok(rows: list[dict[str, Any]]) -> None:
    next(row for row in rows if row["status"] == "ok").update(status="permanent", uid=None)


def pair_lost(store: Store) -> None:
    """A whole shard of a pair less, with all its tables."""
    write_shard(store, ShardRef(FOLDER, 1), ((pair_row(i), image(i)) for i in (4, 5)), PAIRS)


def first_shard_lost(store: Store) -> None:
    for path in (PAIR.table, PAIR.tar, SCORES, SELECTION, TRAINED.table, TRAINED.tar):
        store.delete(path)


def cut_table(store: Store, path: str) -> None:
    store.write(path, store.read(path)[:-9])


LAST = "isn't the tar that was recorded"
DAMAGE: dict[str, tuple[Callable[[Store], object], str, str]] = {
    "a flipped byte of an image": (lambda s: flip(s, PAIR.tar, 700), PAIR.table, f"{PAIR.tar} {LAST}"),
    "a flipped byte of a header": (lambda s: flip(s, PAIR.tar, 3), PAIR.table, PAIR.tar),
    "a flipped byte behind the end": (lambda s: flip(s, PAIR.tar, -1), PAIR.table, PAIR.tar),
    "a cut tar": (lambda s: s.write(PAIR.tar, s.read(PAIR.tar)[:4096]), PAIR.table, PAIR.tar),
    "an empty tar": (lambda s: s.write(PAIR.tar, b""), PAIR.table, PAIR.tar),
    "a missing tar": (lambda s: s.delete(PAIR.tar), PAIR.table, f"{PAIR.tar} is missing"),
    "a cut training tar": (lambda s: s.write(TRAINED.tar, b"x" * 512), TRAINED.table, LAST),
    "a row less": (lambda s: change(s, PAIR.table, list.pop), PAIR.table, "3 rows where 4 were recorded"),
    "two rows swapped": (lambda s: (change(s, PAIR.table, swap), change(s, SCORES, swap)), SELECTION, "row by row"),
    "a wrong offset": (lambda s: change(s, PAIR.table, set_first("image_offset", 1024)), PAIR.table, "an offset"),
    "a wrong size": (lambda s: change(s, PAIR.table, set_first("text_size", 1)), PAIR.table, "an offset or a size"),
    "a blank status": (lambda s: change(s, PAIR.table, set_first("status", None)), PAIR.table, "for 3 living rows"),
    "another text": (lambda s: change(s, PAIR.table, set_first("text", "cat")), PAIR.table, "the text in the tar"),
    "another sha256": (lambda s: change(s, PAIR.table, set_first("sha256", "0" * 64)), PAIR.table, "the uid isn't"),
    "another key": (lambda s: change(s, PAIR.table, set_first("key", "x")), PAIR.table, "the key or the JSON"),
    "another text in the tar": (another_text, PAIR.table, "the text in the tar"),
    "another uid in the JSON": (another_json, PAIR.table, "the key or the JSON names another pair"),
    "a broken JSON": (broken_json, PAIR.table, "JSONDecodeError"),
    "another extension": (another_extension, PAIR.table, "its members are named png, txt, json"),
    "a cut table": (lambda s: cut_table(s, PAIR.table), PAIR.table, "a Parquet table"),
    "a column less": (lambda s: s.write_table(PAIR.table, s.read_table(PAIR.table).drop(["exif"])),
                      PAIR.table, "columns"),
    "a stray table": (lambda s: s.write_table(f"{FOLDER}/notes.parquet", PAIRS.empty_table()),
                      f"{FOLDER}/notes.parquet", "named"),
    "swapped score rows": (lambda s: change(s, SCORES, swap), SCORES, "row by row"),
    "a score row less": (lambda s: change(s, SCORES, list.pop), SCORES, "row by row"),
    "a flipped byte of scores": (lambda s: flip(s, SCORES, 60), SCORES, "a Parquet table"),
    "scores of no shard": (lambda s: s.write(SCORES.replace("00000", "00007"), s.read(SCORES)),
                           SCORES.replace("00000", "00007"), "no shard"),
    "scores in the wrong folder": (lambda s: s.write("scores/x.parquet", s.read(SCORES)), "scores/x.parquet", "Error"),
    "a swapped selection": (lambda s: change(s, SELECTION, swap), SELECTION, "row by row"),
    "a selection of other columns": (lambda s: s.write(SELECTION, s.read(SCORES)), SELECTION, "those of a selection"),
    "unsorted candidates": (lambda s: change(s, CANDIDATES, swap), CANDIDATES, "sorted"),
    "a candidate twice": (lambda s: change(s, CANDIDATES, lambda r: r.insert(1, r[0])), CANDIDATES, "unique"),
    "double ledger rows": (lambda s: change(s, LEDGER_PART, lambda r: r.append(r[0])), CANDIDATES, "two rows"),
    "a ledger row without a candidate": (ledger_row_without_candidate, CANDIDATES, "a row has no candidate"),
    "a cut ledger": (lambda s: cut_table(s, LEDGER_PART), CANDIDATES, LEDGER_PART),
    "a candidate without a ledger row": (lambda s: change(s, LEDGER_PART, list.pop), f"ledger/{GROUP}/0000", "1 of 9"),
    "an ok without a pair": (pair_lost, FOLDER, "1 pairs that the ledger calls ok are missing, 0 are not"),
    "a pair without an ok": (lambda s: change(s, LEDGER_PART, not_ok), FOLDER, "0 pairs that the ledger calls ok"),
    "a shard left out": (first_shard_lost, FOLDER, "shards [1] where the ledger has parts [0, 1]"),
    "a lost ledger part": (lambda s: s.delete(LEDGER_PART), f"ledger/{GROUP}/0000", "4 of 9 candidates have no row"),
    "a kept pair that isn't trained on": (lambda s: change(s, SELECTION, set_first("kept", True)),
                                          TRAINED.folder.split("/web")[0], f"1 kept pairs of {GROUP}/0000"),
    "a dropped pair that is trained on": (lambda s: change(s, SELECTION, lambda r: r[1].update(kept=False)),
                                          TRAINED.folder.split("/web")[0], "1 training examples of"),
    "a changed model file": (lambda s: flip(s, model_file(s), 9), "models/", "its content isn't what its name says"),
    "a model file more": (lambda s: s.write(model_file(s) + ".x", b""), "models/", "its content isn't"),
    "a damaged list of the dead": (lambda s: cut_table(s, "tombstones.parquet"), "tombstones.parquet", "Parquet"),
}  # fmt: skip


def test_a_sound_workspace_is_ok(sound: Workspace) -> None:
    seen: list[str] = []
    verdict = verify(sound, seen.append)
    assert verdict.ok and verdict.problems == [] == verdict.unfinished
    assert verdict.checked == {
        "tars": 4, "rows in pairs": 7, "rows in shards": 5, "tables in scores": 2, "tables in selections": 2,
        "candidates": 9, "ledger rows": 9, "increments": 1, "models": 1, "tombstones": 1,
    }  # fmt: skip
    assert {PAIR.table, SCORES, CANDIDATES} <= set(seen)


def test_an_empty_workspace_is_ok(workspace: Workspace) -> None:
    assert verify(workspace).ok


def test_a_workspace_in_memory_is_checked_too(memory_store: Store) -> None:
    workspace = Workspace.open(memory_store.root, create=True)
    write_shard(memory_store, PAIR, [(pair_row(0), image(0))], PAIRS)
    assert verify(workspace).checked["tars"] == 1 and verify(workspace).ok
    flip(memory_store, PAIR.tar, 700)
    assert not verify(workspace).ok


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_its_path(damage: str, sound: Workspace) -> None:
    do, path, words = DAMAGE[damage]
    do(sound.store)
    verdict = verify(sound)
    assert not verdict.ok
    assert any(where.startswith(path) and words in what for where, what in verdict.problems), verdict.problems


def test_one_damage_does_not_hide_another(sound: Workspace) -> None:
    flip(sound.store, PAIR.tar, 3)
    change(sound.store, CANDIDATES, swap)
    change(sound.store, SCORES, swap)
    verdict = verify(sound)
    assert {path for path, _ in verdict.problems} == {PAIR.table, CANDIDATES, SCORES}
    whats = [what for path, what in verdict.problems if path == PAIR.table]
    assert len(whats) == 2 and LAST in whats[0]  # the hash, and why the tar can't be read


def test_a_tar_without_a_table_is_unfinished_not_damaged(sound: Workspace) -> None:
    for path in (PAIR.table, SCORES, SELECTION, TRAINED.table, TRAINED.tar):
        sound.store.delete(path)
    sound.store.delete("runs", recursive=True)  # a run is pinned once all of its increments are fetched
    verdict = verify(sound)
    assert verdict.ok and verdict.unfinished == [PAIR.tar]


def test_what_is_under_way_is_no_damage(sound: Workspace) -> None:
    store = sound.store
    store.write_table("candidates/web/0001/part-00000.parquet", store.read_table(CANDIDATES).slice(0, 3))
    store.write_table(LEDGER_PART.replace("/0000/", "/0001/"), store.read_table(LEDGER_PART).slice(0, 0))
    store.delete(TRAINED.table)
    verdict = verify(sound)
    assert verdict.problems == []
    assert verdict.unfinished == [TRAINED.tar, f"shards/small-bbbbbbbbbbbb/{GROUP}/0000"]


def test_a_kept_pair_that_is_forgotten_since_is_not_missed(sound: Workspace) -> None:
    change(sound.store, SELECTION, set_first("kept", True))
    assert not verify(sound).ok
    sound.bury("uid", [str(pair_row(0)["uid"])], "asked for")
    problems = verify(sound).problems
    assert {path.split("/")[0] for path, _ in problems} == {"pairs", "scores"}, "it is missed nowhere, and still there"
    assert all("run `pairmill forget` on this workspace again" in what for _, what in problems)


def test_a_ledger_of_other_settings_is_checked_by_itself(sound: Workspace) -> None:
    for path in sound.store.files("ledger", ".parquet"):
        sound.store.write(path.replace(GROUP, "web-dddddddddddd"), sound.store.read(path))
    assert verify(sound).problems == []
    change(sound.store, LEDGER_PART.replace(GROUP, "web-dddddddddddd"), lambda r: r.append(r[0]))
    assert not verify(sound).ok


def test_a_forgotten_pair_keeps_its_row(sound: Workspace) -> None:
    gone = members(sound.store)[0][0]
    rewrite_tar(sound.store, [m for m in members(sound.store) if m[0] != gone])
    shift = read_shard(sound.store, PAIR)
    sizes = [len(data) for _, _, data in members_of_tar(shift.tar)]
    assert len(sizes) == 9
    places = iter(members_of_tar(shift.tar))

    def blank(rows: list[dict[str, Any]]) -> None:
        rows[0].update({name: None for name in rows[0] if name not in ("uid", "url_key")} | {"status": "forgotten"})
        for row in rows[1:]:
            for name in ("image", "text", "json"):
                row[f"{name}_offset"] = next(places)[1]

    change(sound.store, PAIR.table, blank)
    assert verify(sound).problems == []


def members_of_tar(tar: bytes) -> list[tuple[str, int, bytes]]:
    from pairs.tar import read_members

    return [(m.key, m.offset, tar[m.offset : m.offset + m.size]) for m in read_members(tar, "t")]


def test_a_link_in_a_model_is_followed_or_named(sound: Workspace, tmp_path: Path) -> None:
    assert sound.store.local
    path = sound.store.local / model_file(sound.store)
    (tmp_path / "blob").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "blob")
    assert verify(sound).ok
    (tmp_path / "blob").write_bytes(b"other weights")
    assert [what for _, what in verify(sound).problems] == ["its content isn't what its name says"]
    (tmp_path / "blob").unlink()
    assert "a link to" in verify(sound).problems[0][1]


def test_json_facts_are_json(sound: Workspace) -> None:
    assert all(json.loads(data)["uid"] == key for key, ext, data in members(sound.store) if ext == "json")
