"""Canaries tell how good the filters are, and change nothing that is real."""

from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest

from filters.canaries import defect_of, facts_path, make_canaries, set_apart
from filters.canary_figures import (
    noise,
    precision,
    recall_at_false_drops,
    roc_auc,
    roc_points,
    verdict_auc,
    wilson,
    without_noise,
)
from filters.canary_report import Judged, report
from filters.defects import DEFECTS, Given, _other_language
from filters.engine import plan, score_shards
from filters.exact_duplicates import ExactDuplicates
from filters.image_hash import ImageHash
from filters.near_duplicates import NearDuplicates
from filters.reduce import run_reducers
from filters.selection import SelectionResult, select
from pairs.errors import PairmillError
from pairs.identity import held_out, make_uid, sha256_hex, url_key
from pairs.recipe import CanariesSpec
from pairs.rules import Rule, TextsSpec
from pairs.schemas import PAIRS
from pairs.shard import ShardRef, read_shard, write_shard
from pairs.workspace import Workspace
from tests.filters.corpus import contents, folder
from tests.filters.shards import draw, encode

KEEP = [
    Rule(column="clip.cosine", min=0.5),
    Rule(one_per="near_duplicates.group"),
    Rule(one_per="exact_duplicates.group"),
]
REDUCERS = {"near_duplicates": NearDuplicates(), "exact_duplicates": ExactDuplicates()}
SPEC = CanariesSpec(per_defect=20, max_fraction=0.5)
BOTH = CanariesSpec(per_defect=40, max_fraction=0.7, defects=["swapped_text", "near_duplicate"])


def fill(workspace: Workspace) -> dict[str, list[ShardRef]]:
    """60 trusted drawings, and web pairs of which the first looks like the first drawing."""
    shards = {}
    for source, start, count in (("clean", 0, 60), ("web", 100, 6)):
        rows = []
        for number in range(start, start + count):
            data = encode(draw(0 if number == 100 else number, 96, 128), "jpg")
            key = url_key(f"http://{source}.test/{number}.jpg")
            text = f"drawing number {number}"
            row = dict.fromkeys(PAIRS.names) | {"uid": make_uid(key, sha256_hex(data)), "url_key": key, "status": "ok"}
            row |= {"text": text, "texts": [{"text": text, "kind": "alt", "language": None}], "image_ext": "jpg"}
            rows.append((row | {"width": 128, "height": 96, "sha256": sha256_hex(data)}, data))
        shards[source] = [ShardRef(f"pairs/{source}-0123456789ab/0000", 0)]
        write_shard(workspace.store, shards[source][0], rows, PAIRS)
    return shards


def curate(workspace: Workspace, canaries: list[ShardRef]) -> tuple[SelectionResult, dict[str, str]]:
    """Scores, reduces and selects; `clip.cosine` is 0.9 but for canaries with a swapped text and one twin."""
    shards = {source: [ShardRef(f"pairs/{source}-0123456789ab/0000", 0)] for source in ("clean", "web")}
    planned = plan({"image_hash": ImageHash()})
    refs = [ref for listed in shards.values() for ref in listed]
    score_shards(workspace.store, planned, [*refs, *canaries], engine="inline", workers=1)
    for ref in [*refs, *canaries]:
        table = workspace.store.read_table(ref.table)
        cosine = [0.9] * table.num_rows
        if ref in canaries and "swapped_text" in ref.folder:
            facts = workspace.store.read_table(facts_path(ref)).to_pylist()
            cosine = [0.9 if fact["twin"] else 0.1 for fact in facts]
            cosine[next(i for i, f in enumerate(facts) if f["twin"] and f["half"] == "report")] = 0.4
        scored = pa.table({"uid": table["uid"], "cosine": pa.array(cosine, pa.float32())})
        workspace.store.write_table(ref.beside(folder("clip")), scored)
    scores = {one.name: one.folder for one in planned} | {"clip": folder("clip")}
    scores |= run_reducers(workspace.store, REDUCERS, shards, scores, ["clean"])
    return select(workspace.store, "small", KEEP, TextsSpec(), shards, scores, ["clean"]), scores


def test_with_and_without_canaries_every_real_byte_is_the_same(workspace: Workspace, tmp_path: Any) -> None:
    fill(workspace)
    without = Workspace.open(tmp_path / "without", create=True)
    shards = fill(without)
    canaries = make_canaries(workspace.store, shards, ["clean"], SPEC, seed=0)
    curate(workspace, canaries)
    curate(without, [])
    groups = {ref.group for ref in canaries}
    real = {p: b for p, b in contents(workspace.store).items() if not any(group in p for group in groups)}
    assert real == contents(without.store)
    assert any(path.startswith("selections/") for path in real)


def test_canaries_come_from_trusted_pairs_that_are_not_held_out(workspace: Workspace) -> None:
    shards = fill(workspace)
    refs = make_canaries(workspace.store, shards, ["clean"], SPEC, seed=0)
    assert [defect_of(ref) for ref in refs] == list(DEFECTS)
    clean = workspace.store.read_table(shards["clean"][0].table).to_pylist()
    text_of = {pair["uid"]: pair["text"] for pair in clean}
    for ref in refs:
        shard, facts = read_shard(workspace.store, ref), workspace.store.read_table(facts_path(ref)).to_pylist()
        assert len(facts) == 40
        assert [fact["uid"] for fact in facts] == shard.table["uid"].to_pylist()
        images = list(shard.images())
        pairs = zip(
            facts[::2], facts[1::2], shard.table["text"].to_pylist()[::2], images[::2], images[1::2], strict=True
        )
        for canary, twin, text, image, twin_image in pairs:
            assert not held_out(canary["origin"])
            assert (canary["twin"], twin["twin"]) == (False, True)
            assert canary["origin"] == twin["origin"] and canary["half"] == twin["half"]
            defect = DEFECTS[canary["defect"]]
            seen, untouched = (cv2.imdecode(np.frombuffer(data, np.uint8), 1) for data in (image, twin_image))
            assert seen is not None and untouched is not None
            assert (image == twin_image) == (defect.text or defect.duplicate)
            assert (text != text_of[canary["origin"]]) == defect.text
            assert (text in text_of.values()) == (canary["defect"] not in ("boilerplate_text", "other_language"))
    before = contents(workspace.store)
    assert make_canaries(workspace.store, shards, ["clean"], SPEC, seed=0) == refs
    assert contents(workspace.store) == before
    assert make_canaries(workspace.store, shards, ["clean"], SPEC, seed=1) != refs


def test_all_that_canaries_are_made_from_is_set_apart(workspace: Workspace) -> None:
    shards = fill(workspace)
    refs = make_canaries(workspace.store, shards, ["clean"], SPEC, seed=0)
    apart = set_apart(workspace.store, refs)
    assert set_apart(workspace.store, refs[:1]) == set_apart(workspace.store, refs[1:]) == apart and len(apart) == 20
    clean = workspace.store.read_table(shards["clean"][0].table).to_pylist()
    texts = {pair["text"] for pair in clean if pair["uid"] in apart}
    assert set(read_shard(workspace.store, refs[0]).table["text"].to_pylist()) <= texts, "swapped ones too"
    fewer = make_canaries(workspace.store, shards, ["clean"], SPEC, 0, apart[:8])
    assert set_apart(workspace.store, fewer) == apart[:8]
    assert make_canaries(workspace.store, shards, ["clean"], SPEC, 0, apart) == refs


def test_only_what_is_asked_for_is_planted(workspace: Workspace) -> None:
    shards = fill(workspace)
    some = CanariesSpec(per_defect=3, max_fraction=0.5, defects=["blank", "swapped_text"])
    refs = make_canaries(workspace.store, shards, ["clean"], some, seed=0)
    assert [defect_of(ref) for ref in refs] == ["swapped_text", "blank"]
    assert make_canaries(workspace.store, shards, ["clean"], CanariesSpec(per_defect=0), seed=0) == []


def test_the_report_counts_what_the_rules_catch(workspace: Workspace) -> None:
    shards = fill(workspace)
    canaries = make_canaries(workspace.store, shards, ["clean"], BOTH, seed=0)
    result, scores = curate(workspace, canaries)
    pins = result.manifest["thresholds"]
    real = Judged(workspace.store, shards, ["clean"], scores, REDUCERS, KEEP, TextsSpec(), result.folder, pins)
    told = report(canaries, real)
    swapped, copies = told["defects"]["swapped_text"], told["defects"]["near_duplicate"]
    by_rule = {rule["rule"]: (rule["recall"]["value"], rule["false_drops"]["value"]) for rule in swapped["rules"]}
    n = swapped["twins"]
    assert 10 < n < 30
    assert by_rule[KEEP[0].name] == by_rule["selection"] == (1.0, 1 / n)
    assert by_rule[KEEP[1].name] == by_rule["texts"] == (0.0, 0.0)
    auc = {figure["column"]: figure["auc"]["value"] for figure in swapped["auc"]}
    assert auc == {
        "clip.cosine": 1.0, "near_duplicates.group": 0.5, "near_duplicates.distance": 0.5, "exact_duplicates.group": 0.5
    }  # fmt: skip
    expected = 0.1 / (0.1 + 0.9 / n)
    assert swapped["precision"]["value"] == pytest.approx(expected)
    by_rule = {rule["rule"]: (rule["recall"]["value"], rule["false_drops"]["value"]) for rule in copies["rules"]}
    recall, false_drops = by_rule[KEEP[1].name]
    assert recall >= 0.5
    assert false_drops <= 0.2
    kinds = {entry["kind"]: entry["recall"] for entry in copies["kinds"]}
    assert sum(kind["n"] for kind in kinds.values()) == copies["canaries"]
    assert kinds["mirrored"]["value"] == 0.0 and kinds["re-encoded"]["value"] == 1.0  # hashes know left from right
    assert {a["column"]: a["auc"]["value"] for a in copies["auc"]}["near_duplicates.distance"] > 0.7
    assert by_rule[KEEP[2].name] == (0.0, 0.0)  # another encoding has other bytes


def test_reducers_are_asked_once_whatever_the_thresholds(workspace: Workspace, monkeypatch: Any) -> None:
    """Answers are kept for as long as corpus, canaries and tombstones are the same, and give the same figures."""
    shards = fill(workspace)
    canaries = make_canaries(workspace.store, shards, ["clean"], BOTH, seed=0)
    result, scores = curate(workspace, canaries)
    pins, queries = result.manifest["thresholds"], list[str]()

    def told(keep: list[Rule] = KEEP) -> dict[str, Any]:
        queries.clear()
        real = Judged(workspace.store, shards, ["clean"], scores, REDUCERS, keep, TextsSpec(), result.folder, pins)
        return report(canaries, real)

    for kind in {type(one) for one in REDUCERS.values()}:

        def counted(self: Any, *given: Any, answer: Any = kind.query) -> pa.Table:
            queries.append(type(self).__name__)
            return answer(self, *given)

        monkeypatch.setattr(kind, "query", counted)
    first = told()
    assert sorted(queries) == ["ExactDuplicates", "NearDuplicates"] and len(workspace.store.files("asked")) == 2
    before = contents(workspace.store)
    assert told() == first and not queries and contents(workspace.store) == before
    stricter = told([Rule(column="clip.cosine", min=0.95), *KEEP[1:]])
    assert not queries and stricter["defects"]["swapped_text"]["rules"][0]["false_drops"]["value"] == 1.0
    workspace.bury("uid", ["0" * 32], "asked for")
    told()
    assert len(queries) == 2, "tombstones may change what is answered"
    del shards["web"]
    told()
    assert len(queries) == 2, "so may the corpus"


def test_a_swapped_text_is_caught_where_only_a_synthetic_one_is_kept(workspace: Workspace) -> None:
    shards = fill(workspace)
    canaries = make_canaries(workspace.store, shards, ["clean"], SPEC, seed=0)[:1]
    result, scores = curate(workspace, canaries)
    table = workspace.store.read_table(canaries[0].table)
    twin = workspace.store.read_table(facts_path(canaries[0]))["twin"].to_pylist()
    made = {"texts": [["a drawing"]] * len(twin)}
    matched = {"probability": [[0.9 if own else 0.1, 0.9] for own in twin]}
    for name, columns in (("blip_caption", made), ("blip_match", matched)):
        workspace.store.write_table(canaries[0].beside(folder(name)), pa.table({"uid": table["uid"], **columns}))
        scores[name] = folder(name)
    spec = TextsSpec.model_validate({"from": ["texts", "blip_caption.texts"], "match": "blip_match.probability"})
    told = report(canaries, Judged(workspace.store, shards, ["clean"], scores, {}, [], spec, result.folder, {}))
    (texts, _) = told["defects"]["swapped_text"]["rules"]
    assert (texts["rule"], texts["recall"]["value"], texts["false_drops"]["value"]) == ("texts", 1.0, 0.0)


def test_a_share_of_the_fitting_twins_own_texts_may_be_dropped(workspace: Workspace) -> None:
    """Whatever a match filter's scale is: the twins of the fitting half have 0.001, 0.002, … for their own texts, those
    that report 0.9 as all others, and the captions 0."""
    shards = fill(workspace)
    (planted,) = make_canaries(
        workspace.store, shards, ["clean"], BOTH.model_copy(update={"defects": ["swapped_text"]}), 0
    )
    facts = workspace.store.read_table(facts_path(planted)).to_pylist()
    mine = [row for row, fact in enumerate(facts) if fact["twin"] and fact["half"] == "fit"]
    own = [0.9] * len(facts)
    for place, row in enumerate(mine):
        own[row] = (1 + place) / 1000
    scores = {"blip_caption": folder("blip_caption"), "blip_match": folder("blip_match")}
    for ref in [planted, *shards["clean"], *shards["web"]]:
        values = own if ref == planted else [0.002] * workspace.store.read_table(ref.table).num_rows
        columns = {"blip_caption": {"texts": [["a drawing"]] * len(values)}}
        columns |= {"blip_match": {"probability": pa.array([[v, 0.0] for v in values], pa.list_(pa.float32()))}}
        for name, made in columns.items():
            uids = workspace.store.read_table(ref.table)["uid"]
            workspace.store.write_table(ref.beside(folder(name)), pa.table({"uid": uids, **made}))

    def chosen(share: float, canaries: list[ShardRef], **more: float) -> tuple[SelectionResult, set[str]]:
        given = {"from": ["texts", "blip_caption.texts"], "match": "blip_match.probability", "false_drops": share}
        spec = TextsSpec.model_validate(given | more)
        result = select(workspace.store, "fitted", [], spec, shards, scores, ["clean"], canaries=canaries)
        real = Judged(
            workspace.store, shards, ["clean"], scores, {}, [], spec, result.folder, result.manifest["thresholds"]
        )
        caught = report([planted], real)["defects"]["swapped_text"]["rules"][0]
        assert caught["rule"] == "texts" and caught["false_drops"]["value"] == 0.0, "the fitting half doesn't report"
        (web,) = shards["web"]
        return result, {*workspace.store.read_table(web.beside(result.folder))["dropped_by"].to_pylist()}

    result, dropped = chosen(0.3, [planted])
    (pin,) = result.manifest["thresholds"].values()
    share = sum(np.float32(own[row]) < pin["value"] for row in mine) / len(mine)
    assert 0.3 - 1 / len(mine) < share <= 0.3 and dropped == {"texts"}
    assert pin["found"] == f"by texts false_drops 0.3 over {len(mine)} fitting twins"
    assert chosen(0.3, [])[0].manifest["thresholds"]["texts false_drops 0.3"]["value"] == pin["value"], "pinned"
    assert chosen(0.05, [planted])[1] == {None}
    with pytest.raises(PairmillError, match="0 twins"):
        chosen(0.1, [])
    for least, value in ((0.0001, pin["value"]), (0.5, 0.5)):
        floored = chosen(0.3, [planted], min=least)[0].manifest["thresholds"]
        assert floored[f"texts false_drops 0.3, min {least}"]["value"] == value
    bare, floored = (TextsSpec(match="m.p", false_drops=0.1, **more) for more in ({}, {"min": TextsSpec().min}))  # type: ignore[arg-type]
    assert bare.model_dump() != floored.model_dump(), "fingerprints tell a floor that is the default from none"
    with pytest.raises(ValueError, match="own texts"):
        TextsSpec(false_drops=0.1)


def test_a_target_recall_is_fitted_to_the_half_that_never_reports(workspace: Workspace) -> None:
    """Canaries of the fitting half score 0.1 and up by hundredths, those that report 0.9 as all others: the threshold
    drops the wanted share of the first, and is pinned."""
    shards = fill(workspace)
    spec = CanariesSpec(per_defect=40, max_fraction=0.7, defects=["blank"])
    planted = make_canaries(workspace.store, shards, ["clean"], spec, seed=0)
    _, scores = curate(workspace, planted)
    facts = workspace.store.read_table(facts_path(planted[0])).to_pylist()
    mine = [row for row, fact in enumerate(facts) if not fact["twin"] and fact["half"] == "fit"]
    values = [0.9] * len(facts)
    for place, row in enumerate(mine):
        values[row] = 0.1 + place / 100

    def scored(shift: float) -> None:
        table = pa.table(
            {"uid": [f["uid"] for f in facts], "cosine": pa.array([v + shift for v in values], pa.float32())}
        )
        workspace.store.write_table(planted[0].beside(folder("clip")), table)

    def chosen(again: bool = False, canaries: list[ShardRef] = planted) -> SelectionResult:
        given = ([rule], TextsSpec(), shards, scores, ["clean"])
        return select(workspace.store, "fitted", *given, recalibrate=again, canaries=canaries)

    scored(0.0)
    rule = Rule(column="clip.cosine", target_recall=0.5, defect="blank")
    result = chosen()
    (pin,) = result.manifest["thresholds"].values()
    share = sum(values[row] < pin["value"] for row in mine) / len(mine)
    assert 0.5 <= share < 0.5 + 1 / len(mine) and f"{len(mine)} fitting canaries" in pin["found"]
    pins = result.manifest["thresholds"]
    real = Judged(workspace.store, shards, ["clean"], scores, {}, [rule], TextsSpec(), result.folder, pins)
    (told, *_) = report(planted, real)["defects"]["blank"]["rules"]
    assert (told["rule"], told["recall"]["value"]) == (rule.name, 0.0), "the fitting half doesn't report"
    scored(0.2)
    assert chosen().folder == result.folder and chosen().manifest["thresholds"] == pins
    none = chosen(canaries=[])
    (kept,) = none.manifest["thresholds"].values()
    assert (none.folder, kept["value"], kept["now"], kept["rows_now"]) == (result.folder, pin["value"], None, 0)
    moved = chosen(again=True)
    (new,) = moved.manifest["thresholds"].values()
    assert new["value"] == pytest.approx(pin["value"] + 0.2, abs=1e-6) and moved.folder != result.folder
    with pytest.raises(PairmillError, match="no canaries"):
        chosen(again=True, canaries=[])
    workspace.store.delete("selections", recursive=True)
    with pytest.raises(PairmillError, match="no canaries"):
        chosen(canaries=[])


def test_copies_are_made_as_their_names_say(workspace: Workspace) -> None:
    shards = fill(workspace)
    refs = {defect_of(r): r for r in make_canaries(workspace.store, shards, ["clean"], SPEC, seed=0)}
    images = {name: list(read_shard(workspace.store, ref).images()) for name, ref in refs.items()}
    facts = {name: workspace.store.read_table(facts_path(ref)).to_pylist() for name, ref in refs.items()}
    origins = {}
    for ref in shards["clean"]:
        shard = read_shard(workspace.store, ref)
        origins |= dict(zip(shard.table["uid"].to_pylist(), shard.images(), strict=True))

    def seen(data: bytes | None) -> np.ndarray:
        assert data is not None
        return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).astype(int)

    assert all(
        i == origins[f["origin"]] for i, f in zip(images["exact_duplicate"], facts["exact_duplicate"], strict=True)
    )
    for canary, twin, fact in zip(
        images["watermark"][::2], images["watermark"][1::2], facts["watermark"][::2], strict=True
    ):
        changed = np.abs(seen(canary) - seen(twin)).max(axis=2) > 24
        assert 0.005 < changed.mean() < 0.6, fact
        assert np.abs(seen(twin) - seen(origins[fact["origin"]])).mean() < 6
    for canary, twin in zip(images["blank"][::2], images["blank"][1::2], strict=True):
        assert seen(canary)[8:-8, 8:-8].std(axis=(0, 1)).max() < 2 < seen(twin).std()
    copies = zip(images["near_duplicate"][::2], facts["near_duplicate"][::2], strict=True)
    mirrored = [(seen(image), seen(origins[f["origin"]])) for image, f in copies if f["kind"] == "mirrored"]
    assert mirrored and all(np.abs(a[:, ::-1] - b).mean() < 6 for a, b in mirrored)
    assert {f["kind"] for f in facts["near_duplicate"]} == {"mirrored", "resized", "re-encoded", "cropped"}


def test_a_language_that_the_page_declares_is_no_defect() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    for declared in ("de", "fr-CA", None):
        found = {_other_language(Given(str(n), 0, pixels, declared)).kind for n in range(200)}
        assert len(found) == (9 if declared is None else 8) and (declared or "")[:2] not in found


def test_noise_among_the_twins_is_bounded_and_taken_out() -> None:
    """A quarter of the twins has the defect; scores of clean and defective ones overlap."""
    chance = np.random.default_rng(0)
    clean, dirty = (lambda n: chance.normal(2, 1, n)), (lambda n: chance.normal(0, 1, n))
    canaries, twins = dirty(2000), np.concatenate([clean(1500), dirty(500)])
    truth, seen = roc_auc(canaries, clean(5000))["value"], roc_auc(canaries, twins)
    dirt = noise({"a": (canaries, twins), "blind": (chance.random(2000), chance.random(2000))})
    assert dirt is not None and 0.1 < dirt["value"] < 0.15 and dirt["high"] > 0.25
    told = without_noise(seen, dirt)
    assert seen["value"] < truth - 0.05 and told["observed"] == seen["value"]
    assert told["low"] <= truth <= told["high"] and abs(told["value"] - truth) < abs(seen["value"] - truth)
    recall, false = wilson((canaries < 1).sum(), 2000), wilson((twins < 1).sum(), 2000)
    fixed = without_noise(false, dirt, recall)
    assert fixed["low"] <= (clean(5000) < 1).mean() <= fixed["high"] < false["value"] + 0.05
    assert fixed["value"] < false["value"]
    assert noise({"blind": (chance.random(2000), chance.random(2000))}) is None
    assert without_noise(seen, None)["bound"] == "worst"
    assert roc_points(canaries, clean(500))[-1] == [1.0, 1.0]
    assert verdict_auc(wilson(9, 10), wilson(1, 10))["value"] == pytest.approx(0.9)


def test_without_trusted_pairs_figures_are_freed_of_noise(workspace: Workspace) -> None:
    shards = {"web": fill(workspace)["clean"]}
    canaries = make_canaries(workspace.store, shards, [], BOTH, seed=0)
    assert [defect_of(ref) for ref in canaries] == ["swapped_text", "near_duplicate"]
    planned = plan({"image_hash": ImageHash()})
    score_shards(workspace.store, planned, [*shards["web"], *canaries], engine="inline", workers=1)
    scores = {one.name: one.folder for one in planned}
    scores |= run_reducers(workspace.store, REDUCERS, shards, scores, [])
    result = select(workspace.store, "all", KEEP[1:], TextsSpec(), shards, scores, [])
    real = Judged(workspace.store, shards, [], scores, REDUCERS, KEEP[1:], TextsSpec(), result.folder, {})
    told = report(canaries, real)["defects"]
    assert told["swapped_text"]["noise"] is None, "no score tells it"
    assert all(rule["false_drops"]["bound"] == "worst" for rule in told["swapped_text"]["rules"])
    assert told["near_duplicate"]["noise"]["high"] < 0.8
    assert all("observed" in entry["auc"] for entry in told["near_duplicate"]["auc"])


def test_figures_by_hand() -> None:
    assert wilson(9, 10) == pytest.approx({"value": 0.9, "low": 0.5958, "high": 0.9821, "n": 10}, abs=1e-4)
    assert wilson(0, 0)["value"] is None
    for n in range(1, 400):  # 109 of 109 ended at 0.9999999999999998
        for hits in (0, 1, n - 1, n):
            found = wilson(hits, n)
            assert found["low"] <= found["value"] <= found["high"]
    assert roc_auc(np.array([0.1, 0.5, np.nan]), np.array([0.5, 0.9]))["value"] == (1 + 1 + 0.5 + 1) / 4
    assert precision({"value": 0.8, "low": 0.8, "high": 0.8, "n": 5}, {"value": 0.1, "low": 0.1, "high": 0.1}, 0.5)[
        "value"
    ] == pytest.approx(8 / 9)
    twins, canaries = np.arange(10.0), np.array([-1.0, 0.5, 1.5, 5.0, np.nan])
    assert recall_at_false_drops(canaries, twins, 0.1) == {**wilson(3, 5), "threshold": 1.0}
    assert recall_at_false_drops(canaries, twins, 0.0)["value"] == 2 / 5
