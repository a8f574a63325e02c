"""Selections judge: rules commute, thresholds are pinned, incumbents stay, trusted pairs are never dropped."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filters.columns import load_frame
from filters.selection import SelectionResult, select
from pairs.errors import PairmillError
from pairs.identity import held_out
from pairs.rules import Rule, TextsSpec
from pairs.schemas import CANDIDATES, LEDGER, PAIRS
from pairs.shard import ShardRef, write_shard
from pairs.store import Store
from pairs.workspace import Workspace
from tests.filters.corpus import add, contents, folder, numbers, row, uid_of

SCORES = {"clip": folder("clip"), "near": folder("near")}
KEEP = [Rule(column="clip.cosine", min=0.2), Rule(column="clip.words", max=5)]


def clip(cosine: list[float | None], words: list[int | None] | None = None) -> dict[str, Any]:
    counted = words if words is not None else [3] * len(cosine)
    return {"clip": {"cosine": pa.array(cosine, pa.float32()), "words": pa.array(counted, pa.int32())}}


def near(group: list[str | None]) -> dict[str, Any]:
    return {"near": {"group": pa.array(group, pa.string())}}


def run(
    workspace: Workspace, keep: list[Rule], shards: list[ShardRef], trusted: list[ShardRef] | None = None, **more: Any
) -> SelectionResult:
    by_source = {"web": shards} | ({"clean": trusted} if trusted else {})
    spec = more.pop("texts", TextsSpec())
    return select(workspace.store, "small", keep, spec, by_source, SCORES, ["clean"], **more)


def verdicts(workspace: Workspace, result: SelectionResult, ref: ShardRef) -> list[str | None]:
    return workspace.store.read_table(ref.beside(result.folder))["dropped_by"].to_pylist()


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.one_of(st.none(), st.floats(-1, 1)), st.one_of(st.none(), st.integers(0, 9))), max_size=20)
)
def test_rules_commute_and_the_funnel_adds_up(rows: list[tuple[float | None, int | None]]) -> None:
    workspace = Workspace.open(f"memory://{np.random.default_rng().integers(2**60)}", create=True)
    ref = add(workspace, "web", "0000", range(len(rows)), clip([c for c, _ in rows], [w for _, w in rows]))
    keep = [*KEEP, Rule(column="clip.cosine", top_fraction=0.5)]
    found = []
    for order in (keep, keep[::-1], [keep[1], keep[2], keep[0]]):
        result = run(workspace, list(order), [ref])
        table = workspace.store.read_table(ref.beside(result.folder))
        found.append((table["kept"].to_pylist(), [sorted(names) for names in table["would_drop"].to_pylist()]))
        funnel = result.funnel["total"]
        assert funnel["pairs"] == len(rows)
        assert funnel["pairs"] - sum(rule["dropped"] for rule in funnel["rules"]) == funnel["kept"] == sum(found[-1][0])
        assert [rule["nulls"] for rule in funnel["rules"] if rule["name"] == KEEP[1].name] == [
            sum(words is None for _, words in rows)
        ]
    assert all(one == found[0] for one in found)
    for kept, (cosine, words) in zip(found[0][0], rows, strict=True):
        if kept:
            assert cosine is not None and np.float32(cosine) >= 0.2 and words is not None and words <= 5
    workspace.store.delete("", recursive=True)


def test_a_quantile_is_pinned_and_later_increments_reuse_it(workspace: Workspace) -> None:
    keep = [Rule(column="clip.cosine", top_fraction=0.5)]
    first = add(workspace, "web", "0000", range(4), clip([0.1, 0.4, None, 0.3]))
    before = run(workspace, keep, [first])
    assert before.manifest["thresholds"][keep[0].name]["value"] == pytest.approx(0.3)
    assert verdicts(workspace, before, first) == [keep[0].name, None, keep[0].name, None]
    bytes_before = workspace.store.read(first.beside(before.folder))

    second = add(workspace, "web", "0001", range(4, 8), clip([0.9, 0.8, 0.7, 0.25]))
    after = run(workspace, keep, [first, second])
    assert (after.folder, after.written) == (before.folder, 1)
    assert workspace.store.read(first.beside(after.folder)) == bytes_before
    assert verdicts(workspace, after, second) == [None, None, None, keep[0].name]
    pinned = after.manifest["thresholds"][keep[0].name]
    assert pinned["value"] == pytest.approx(0.3)
    assert pinned["now"] == pytest.approx(0.4)
    assert (after.manifest["counts"]["kept"], after.funnel["total"]["kept"]) == (5, 5)

    moved = run(workspace, keep, [first, second], recalibrate=True)
    assert moved.folder != before.folder
    assert moved.manifest["thresholds"][keep[0].name]["value"] == pytest.approx(0.4)
    assert workspace.store.read(first.beside(before.folder)) == bytes_before
    again = run(workspace, keep, [first, second])
    assert (again.folder, again.written, again.funnel) == (moved.folder, 0, moved.funnel)
    assert run(workspace, keep, [first, second], recalibrate=True).folder == moved.folder


def test_a_second_run_reads_no_score_and_changes_no_byte(workspace: Workspace) -> None:
    ref = add(workspace, "web", "0000", range(3), clip([0.1, 0.3, 0.5]))
    run(workspace, KEEP, [ref])
    before = contents(workspace.store)
    workspace.store.delete(folder("clip"), recursive=True)
    again = run(workspace, KEEP, [ref])
    assert (again.written, again.kept) == (0, 2)
    assert contents(workspace.store) == {p: data for p, data in before.items() if not p.startswith("scores/")}


def test_an_incumbent_stays_when_a_better_pair_comes_later(workspace: Workspace) -> None:
    keep = [Rule(one_per="near.group", best="clip.cosine")]
    first = add(workspace, "web", "0000", range(4), clip([0.1, 0.5, 0.3, 0.2]) | near(["a", "a", "b", None]))
    before = run(workspace, keep, [first])
    assert verdicts(workspace, before, first) == [keep[0].name, None, None, keep[0].name]
    second = add(workspace, "web", "0001", [4, 5, 6], clip([0.9, 0.4, 0.6]) | near(["a", "c", "c"]))
    after = run(workspace, keep, [first, second])
    assert verdicts(workspace, after, first) == verdicts(workspace, before, first)
    assert verdicts(workspace, after, second) == [keep[0].name, keep[0].name, None]
    assert after.funnel["total"]["rules"][-1] == {
        "name": keep[0].name, "dropped": 4, "would_drop": 4, "nulls": 1, "left": 3,
    }  # fmt: skip


def test_one_per_looks_at_survivors_only_and_ties_go_to_the_uid(workspace: Workspace) -> None:
    keep = [Rule(column="clip.words", min=3), Rule(one_per="near.group", best="clip.cosine")]
    values = clip([0.9, 0.5, 0.5, None], [1, 3, 3, 3]) | near(["a"] * 4)
    ref = add(workspace, "web", "0000", range(4), values)
    kept = min((1, 2), key=lambda n: uid_of("web", n))
    expected = [keep[0].name, keep[1].name, keep[1].name, keep[1].name]
    expected[kept] = None
    assert verdicts(workspace, run(workspace, keep, [ref]), ref) == expected


def test_trusted_pairs_stay_and_their_look_alikes_go(workspace: Workspace) -> None:
    keep = [*KEEP, Rule(one_per="near.group", best="clip.cosine")]
    (held,) = numbers(1, held=True)
    members = [*numbers(3), held]
    trusted = add(
        workspace, "clean", "0000", members, clip([0.0, None, 0.9, 0.9], [99] * 4) | near(["a", "a", None, "h"])
    )
    web = add(workspace, "web", "0000", range(3), clip([0.9, 0.9, 0.9]) | near(["a", "h", "w"]))
    result = run(workspace, keep, [web], [trusted])
    assert verdicts(workspace, result, trusted) == [None, None, None, "held_out"]
    assert verdicts(workspace, result, web) == [keep[-1].name, keep[-1].name, None]
    assert result.funnel["sources"]["clean"]["trusted"] == 4


def test_quarantine_judges_trusted_pairs_too(workspace: Workspace) -> None:
    safe = Rule.model_validate({"column": "clip.cosine", "max": 0.5, "quarantine": True})
    trusted = add(workspace, "clean", "0000", numbers(3), clip([0.9, 0.1, None], [99] * 3))
    result = run(workspace, [KEEP[1], safe], [], [trusted])
    assert verdicts(workspace, result, trusted) == [safe.name, None, safe.name]  # what has no score isn't known safe


def test_held_out_pairs_are_behind_no_threshold(workspace: Workspace) -> None:
    keep = [Rule(column="clip.cosine", top_fraction=0.5)]
    web = add(workspace, "web", "0000", range(2), clip([0.1, 0.2]))
    trusted = add(workspace, "clean", "0000", numbers(5, held=True), clip([0.9] * 5))
    thresholds = run(workspace, keep, [web], [trusted]).manifest["thresholds"]
    assert (thresholds[keep[0].name]["value"], thresholds[keep[0].name]["now"]) == (
        pytest.approx(0.2),
        pytest.approx(0.2),
    )


def test_forgotten_pairs_are_dropped_and_lose_their_texts(workspace: Workspace) -> None:
    ref = add(workspace, "web", "0000", range(3), clip([0.9, 0.9, 0.9]))
    workspace.bury("uid", [uid_of("web", 1)], "asked for")
    result = run(workspace, KEEP, [ref])
    table = workspace.store.read_table(ref.beside(result.folder))
    assert table["dropped_by"].to_pylist() == [None, "forgotten", None]
    assert not table["texts"][1].as_py()
    workspace.bury("uid", [uid_of("web", 2)], "asked for")
    later = run(workspace, KEEP, [ref])
    assert (later.kept, later.written) == (1, 0)


def test_the_funnel_begins_at_the_candidates(workspace: Workspace) -> None:
    ref = add(workspace, "web", "0000", range(2), clip([0.9, 0.1]))
    keys = [f"{n:032x}" for n in range(5)]
    candidates = pa.Table.from_pylist([{"url_key": key} for key in keys], schema=CANDIDATES)
    workspace.store.write_table("candidates/web/0000/part-00000.parquet", candidates)
    tried = [("ok", None), ("ok", None), ("permanent", "http_404"), ("refused", "robots")]
    ledger = [{"url_key": k, "status": s, "reason": r} for k, (s, r) in zip(keys, tried, strict=False)]
    workspace.store.write_table(f"ledger/{ref.group}/0000/00000.parquet", pa.Table.from_pylist(ledger, schema=LEDGER))
    funnel = run(workspace, KEEP, [ref]).funnel
    assert funnel["total"] == {key: funnel["sources"]["web"][key] for key in funnel["total"]}
    fetch = funnel["total"]["fetch"]
    assert fetch == {"pair": 2, "permanent/http_404": 1, "refused/robots": 1, "not attempted": 1}
    assert sum(fetch.values()) == funnel["total"]["candidates"] == 5


def test_a_misspelt_column_names_the_nearest(workspace: Workspace) -> None:
    ref = add(workspace, "web", "0000", range(2), clip([0.9, 0.1]))
    for column, hint in (("clip.cosin", "clip.cosine"), ("pairs.widths", "pairs.width"), ("clop.cosine", "clip")):
        with pytest.raises(PairmillError, match=hint):
            run(workspace, [Rule(column=column, min=1)], [ref])
    assert not workspace.store.files("selections")


def test_a_selection_cut_short_ends_as_if_it_had_not_been(workspace: Workspace, tmp_path: Any) -> None:
    keep = [Rule(column="clip.cosine", top_fraction=0.75), Rule(one_per="near.group", best="clip.cosine")]
    values = [clip([0.1, 0.5, 0.8]) | near(["a", "b", "c"]), clip([0.7, 0.2, 0.9]) | near(["a", "b", "c"])]
    refs = [add(workspace, "web", "0000", range(3 * i, 3 * i + 3), v, index=i) for i, v in enumerate(values)]
    whole = run(workspace, keep, refs)
    expected = contents(workspace.store)
    for name in (refs[0].beside(whole.folder), refs[1].beside(whole.folder)):
        workspace.store.delete(name)
        for table in ("manifest.json", "funnel.json"):
            workspace.store.delete(f"{whole.folder}/{table}")
        assert run(workspace, keep, refs).written == 1
        assert contents(workspace.store) == expected


def test_another_rule_is_another_folder_and_another_increment_is_not(workspace: Workspace) -> None:
    ref = add(workspace, "web", "0000", range(2), clip([0.9, 0.1]))
    folders = {run(workspace, [Rule(column="clip.cosine", min=m)], [ref]).folder for m in (0.1, 0.2)}
    later = add(workspace, "web", "0001", [7], clip([0.9]))
    assert len(folders) == 2
    assert run(workspace, [Rule(column="clip.cosine", min=0.2)], [ref, later]).folder in folders


def test_uids_that_differ_are_refused(memory_store: Store) -> None:
    workspace = Workspace(memory_store)
    ref = add(workspace, "web", "0000", range(2), clip([0.9, 0.1]))
    table = memory_store.read_table(ref.beside(folder("clip")))
    memory_store.write_table(ref.beside(folder("clip")), table.take([1, 0]))
    with pytest.raises(PairmillError, match="same order"):
        load_frame(memory_store, {"web": [ref]}, ["clip.cosine"], SCORES, [])


def test_the_manifest_is_plain_json(workspace: Workspace) -> None:
    ref = add(workspace, "web", "0000", range(2), clip([0.9, 0.1]))
    result = run(workspace, KEEP, [ref])
    assert json.loads(workspace.store.read(f"{result.folder}/manifest.json")) == result.manifest
    assert result.manifest["counts"] == {"candidates": None, "pairs": 2, "trusted": 0, "kept": 1}


def test_a_source_without_pairs_is_an_empty_selection(workspace: Workspace) -> None:
    keep = [*KEEP, Rule(column="clip.cosine", top_fraction=0.5), Rule(one_per="near.group", best="clip.cosine")]
    result = run(workspace, keep, [])
    assert (result.kept, result.written, result.manifest["thresholds"]) == (0, 0, {})
    ref = add(workspace, "web", "0000", range(2), clip([0.9, 0.1]) | near(["a", "b"]))
    later = run(workspace, keep, [ref])
    assert later.manifest["thresholds"][keep[2].name]["value"] == pytest.approx(0.9)


def test_the_best_of_words_is_refused(workspace: Workspace) -> None:
    ref = add(workspace, "web", "0000", range(2), near(["a", "a"]))
    with pytest.raises(PairmillError, match=r"near\.group"):
        run(workspace, [Rule(one_per="near.group", best="near.group")], [ref])


def test_a_trusted_twin_of_a_held_out_pair_is_not_trained_on(workspace: Workspace) -> None:
    """By its group of a `one_per`; an ordinary look-alike goes by the rule, as that of any trusted pair."""
    free, held = numbers(2), numbers(1, held=True)
    clean = add(workspace, "clean", "0000", [*free, *held], near(["g", "h", "g"]))
    web = add(workspace, "web", "0000", range(3), near(["g", "x", "y"]))
    rule = Rule(one_per="near.group")
    result = run(workspace, [rule], [web], [clean])
    assert verdicts(workspace, result, clean) == ["held_out_twin", None, "held_out"]
    assert verdicts(workspace, result, web) == [rule.name, None, None]
    told = {step["name"]: step["dropped"] for step in result.funnel["total"]["rules"]}
    assert told == {"forgotten": 0, "held_out": 1, "held_out_twin": 1, "texts": 0, rule.name: 1}


def test_equal_bytes_of_a_held_out_pair_are_not_trained_on_without_any_rule(workspace: Workspace) -> None:
    held, ref = numbers(1, held=True)[0], ShardRef("pairs/clean-0123456789ab/0000", 0)
    image = str(held).encode()
    twin = next(n for n in range(2000) if not held_out(row("clean", n, image)["uid"]))
    other = numbers(1)[0]
    members = [(held, image), (twin, image), (other, str(other).encode())]
    write_shard(workspace.store, ref, [(row("clean", n, data), data) for n, data in members], PAIRS)
    assert verdicts(workspace, run(workspace, [], [], [ref]), ref) == ["held_out", "held_out_twin", None]


def test_a_source_may_have_its_own_condition_or_none(workspace: Workspace) -> None:
    web = add(workspace, "web", "0000", range(3), clip([0.1, 0.3, 0.5]))
    clean = add(workspace, "clean", "0000", numbers(3), clip([0.1, 0.3, 0.5]))

    def dropped(condition: Any) -> list[list[str | None]]:
        rule = Rule.model_validate({"column": "clip.cosine", "min": 0.2, "sources": {"clean": condition}})
        shards = {"web": [web], "clean": [clean]}
        result = select(workspace.store, "small", [rule], TextsSpec(), shards, SCORES, [])
        tables = [workspace.store.read_table(ref.beside(result.folder)) for ref in (web, clean)]
        assert {name for table in tables for name in table["dropped_by"].to_pylist()} <= {None, rule.name}
        return [table["kept"].to_pylist() for table in tables]

    assert dropped({"min": 0.4}) == [[False, True, True], [False, False, True]]
    assert dropped(False) == [[False, True, True], [True, True, True]]
    assert dropped({"top_fraction": 0.34}) == [[False, True, True], [False, False, True]]


def test_a_quantile_looks_at_the_rows_that_it_judges(workspace: Workspace) -> None:
    web = add(workspace, "web", "0000", range(4), clip([0.1, 0.2, 0.3, 0.4]))
    clean = add(workspace, "clean", "0000", numbers(4), clip([0.6, 0.7, 0.8, 0.9]))
    rule = Rule.model_validate(
        {"column": "clip.cosine", "top_fraction": 0.5, "sources": {"clean": {"quantile": [0.0, 0.75]}}}
    )
    result = select(workspace.store, "small", [rule], TextsSpec(), {"web": [web], "clean": [clean]}, SCORES, [])
    pins = {name: (pytest.approx(t["value"]), t.get("high")) for name, t in result.manifest["thresholds"].items()}
    assert pins == {rule.name: (0.3, None), f"{rule.name} at clean": (0.6, pytest.approx(0.8))}
    assert verdicts(workspace, result, clean) == [None, None, None, rule.name]
