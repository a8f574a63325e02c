"""The plan: every pair once per epoch, on any number of ranks, from the tables alone."""

import dataclasses
import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairs.errors import PairmillError
from pairs.shard import ShardRef
from pairs.store import Store, table_metadata
from pairs.workspace import Workspace
from tests.training.small import SPEC, pair, shards
from training.plan import Cost, Plan, grid_of, taken
from training.tables import make_plan
from training.tokens import Tokeniser, Tokens, encode

COST = Cost((2, 32), (2, 32))


@pytest.fixture
def plan(memory_store: Store) -> Plan:
    return make_plan(memory_store, shards(memory_store), SPEC)[0]


def test_each_epoch_takes_every_pair_once_in_another_order(plan: Plan) -> None:
    steps = [plan.rows(step) for step in range(30)]  # 480 pairs: eight epochs of 60
    taken = [pair for rows in steps for pair in rows]
    for epoch in range(8):
        assert sorted(row for e, row in taken if e == epoch) == list(range(60))
    assert [r for e, r in taken if e == 0] != [r for e, r in taken if e == 1]
    assert {len(rows) for rows in steps} == {16}


def test_rows_of_far_blocks_meet_in_a_step(plan: Plan) -> None:
    shard_of = [row // 24 for _, row in plan.rows(0)]
    assert len(set(shard_of)) == 3


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_ranks_share_the_step_without_loss_and_evenly(plan: Plan, ranks: int) -> None:
    for step in range(5):
        parts = plan.split(step, ranks, COST)
        assert sorted(p for part in parts for p in part) == sorted(plan.rows(step))
        loads = [
            sum(float(COST(1 + math.prod(plan.grid(r)), len(plan.tokens.ids[plan.text(e, r)]))) for e, r in part)
            for part in parts
        ]
        assert max(loads) <= 1.25 * sum(loads) / ranks


def test_the_order_hangs_on_seed_and_shards_not_on_ranks(memory_store: Store) -> None:
    pins = shards(memory_store)
    plans = [make_plan(memory_store, pins, SPEC.model_copy(update=u))[0] for u in ({}, {"workers": 4}, {"seed": 1})]
    assert plans[0].fingerprint == plans[1].fingerprint != plans[2].fingerprint
    assert plans[0].digest(3) == plans[1].digest(3) != plans[2].digest(3)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_what_took_a_uid_is_told(plan: Plan, steps: int) -> None:
    uids = {plan.uids[17], plan.uids[40]}
    expected = [(s, plan.uids[row]) for s in range(steps) for _, row in plan.rows(s) if plan.uids[row] in uids]
    assert list(taken(plan, uids, steps)) == expected and (steps < 20 or len(expected) >= 10)
    assert list(taken(plan, {"0" * 32}, steps)) == []


def weighted(store: Store, **weights: float) -> Plan:
    """30 pairs of each of `a` and `b`, 20 of `c`."""
    pins = [
        pin for n, (name, count) in enumerate({"a": 30, "b": 30, "c": 20}.items())
        for pin in shards(store, count, 12, name, 30 * n)
    ]  # fmt: skip
    return make_plan(store, pins, SPEC.model_copy(update={"weights": weights}))[0]


def test_sources_are_met_as_often_as_their_weights_say(memory_store: Store) -> None:
    plan = weighted(memory_store, a=2.5, b=0.4)
    times = np.array([np.bincount(plan.order.of(epoch)[1], minlength=80) for epoch in range(10)])
    assert (
        set(times[:, :30].ravel()) == {2, 3} and set(times[:, 30:60].ravel()) == {0, 1} and (times[:, 60:] == 1).all()
    )
    assert times.sum(1).tolist() == [75 + 12 + 20] * 10
    assert (times.sum(0) == [25] * 30 + [4] * 30 + [10] * 20).all()
    assert (times[:5].sum(0)[30:60] == 2).all() and [plan.order.start(e) for e in (0, 1, 10)] == [0, 107, 1070]
    looks: dict[int, list[int]] = {row: [] for row in range(80)}
    for step in range(-(-plan.order.start(3) // 16)):
        for look, row in plan.rows(step):
            looks[row].append(look)
    assert all(len(set(seen)) == len(seen) for seen in looks.values()), "each meeting is another look"
    assert all(set(range(times[:3, row].sum())) <= set(seen) for row, seen in looks.items())


def test_an_epoch_is_met_whole_by_the_step_that_ends_it(plan: Plan) -> None:
    for epoch in (1, 2, 7):
        steps = range(-(-60 * epoch // 16))
        assert Counter(pair for step in steps for pair in plan.rows(step) if pair[0] < epoch).total() == 60 * epoch
        assert all(plan.window_of(step)[0] <= step < plan.window_of(step)[1] for step in steps)


def test_a_far_step_is_found_at_once(memory_store: Store) -> None:
    plan = weighted(memory_store, a=0.333, b=1.7)
    begin = plan.order.start(123_456)
    assert plan.order.epoch_at(begin) == 123_456 and plan.order.epoch_at(begin - 1) == 123_455
    met, rows = plan.order.entries(begin - 1, begin + 2)
    assert rows[1:].tolist() == plan.order.of(123_456)[1, :2].tolist()
    expected = {"a": 0.333, "b": 1.7, "c": 1.0}
    assert (np.abs(met - [123_456 * expected["aaabbbcc"[row // 10]] for row in rows]) <= 2).all()


def test_weights_are_part_of_a_plan_only_where_there_are_any(memory_store: Store) -> None:
    plain, double = weighted(memory_store), weighted(memory_store, a=2)
    assert plain.fingerprint != double.fingerprint
    assert plain.order.of(0).tolist() == weighted(memory_store, a=1).order.of(0).tolist()


def test_steps_and_ranks_hold_nearly_equal_tokens(memory_store: Store) -> None:
    spec = SPEC.model_copy(update={"batch_pairs": 64, "max_patches": 196})
    plan = varied(make_plan(memory_store, shards(memory_store), SPEC)[0], 4000, spec.batch_pairs)
    assert plan.window_of(0) == plan.window_of(62) == (0, 63)  # an epoch's
    rows, epochs = plan.order.of(0)[1, : 62 * 64].reshape(62, 64), np.zeros(64, np.int64)
    plain = np.array([plan.tokens_of(list(zip(epochs, part, strict=True))).sum(0) for part in rows])
    dealt = np.array([plan.tokens_of(plan.rows(step)).sum(0) for step in range(62)])
    assert (np.ptp(plain, axis=0) > 60).all() and (np.ptp(dealt, axis=0) <= 30).all()
    for ranks in (2, 4):
        shares = [plan.split(3, ranks, COST)[rank] for rank in range(ranks)]
        assert {len(share) for share in shares} == {64 // ranks}
        assert (np.ptp([plan.tokens_of(share).sum(0) for share in shares], axis=0) <= 16).all()


def varied(plan: Plan, count: int, batch_pairs: int) -> Plan:
    """A plan of `count` pairs of many sizes and text lengths."""
    draw = np.random.default_rng(5)
    texts = [np.zeros(n, np.int64) for n in range(3, 40)]
    block = plan.blocks[0]
    return dataclasses.replace(
        plan,
        uids=[f"{n:032x}" for n in draw.permutation(count)],
        texts=[[int(n)] for n in np.minimum(draw.geometric(0.12, count), 36)],
        widths=draw.integers(40, 500, count),
        heights=draw.integers(40, 500, count),
        blocks=[dataclasses.replace(block, first=n, count=50) for n in range(0, count, 50)],
        tokens=Tokens(texts, np.arange(1), 0),
        batch_pairs=batch_pairs,
        max_patches=196,
    )


def test_texts_of_a_pair_are_taken_in_turn_by_chance(plan: Plan) -> None:
    row = next(r for r in range(60) if len(plan.texts[r]) == 2)
    counts = Counter(plan.text(epoch, row) for epoch in range(400))
    assert sum(counts.values()) == 400 and all(150 < n < 250 for n in counts.values())


def test_what_is_left_out_is_counted(tmp_path: object) -> None:
    workspace = Workspace.open(f"{tmp_path}/w", create=True)
    pins = shards(workspace.store)
    dead, buried = pair(3)[0], pair(40)[0]
    workspace.bury("uid", [dead["uid"]], "asked")
    workspace.bury("url_key", [buried["url_key"]], "asked")
    plan, left_out = make_plan(workspace.store, pins, SPEC)
    assert len(plan) == 58 and left_out == {"forgotten": 2}
    assert not {dead["uid"], buried["uid"]} & set(plan.uids)
    assert sum(b.count for b in plan.blocks) == 58


def test_what_canaries_are_made_from_is_not_trained_on(memory_store: Store) -> None:
    pins, apart = shards(memory_store), [pair(n)[0]["uid"] for n in (0, 30)]
    plan, left_out = make_plan(memory_store, pins, SPEC, apart)
    assert left_out == {"canary": 2} and len(plan) == 58 and not set(apart) & set(plan.uids)
    assert plan.fingerprint != make_plan(memory_store, pins, SPEC)[0].fingerprint


def test_bad_shards_are_named(memory_store: Store) -> None:
    pins = shards(memory_store)
    other = pins[0].model_copy(update={"tar_sha256": "f" * 64})
    with pytest.raises(PairmillError, match="rewritten"):
        make_plan(memory_store, [other], SPEC)
    ref = ShardRef(pins[1].folder, 1)
    memory_store.write(ref.tar, memory_store.read(ref.tar)[:-512])
    with pytest.raises(PairmillError, match=r"00001\.tar"):
        make_plan(memory_store, pins, SPEC)
    memory_store.delete(ref.tar)
    with pytest.raises(PairmillError, match="no such file"):
        make_plan(memory_store, pins, SPEC)
    with pytest.raises(PairmillError, match="at least 2 pairs"):
        make_plan(memory_store, [], SPEC)
    with pytest.raises(PairmillError, match="at least 61 pairs"):
        make_plan(memory_store, shards(memory_store), SPEC.model_copy(update={"workers": 61}))


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("width", float("nan"), "whole numbers in the column width"),
        ("image_offset", 10**6, "one that ends at byte 100"),
    ],
)
def test_a_table_that_cannot_be_of_its_tar_is_named(memory_store: Store, column: str, value: float, told: str) -> None:
    pin = shards(memory_store)[0]
    table = memory_store.read_table(pin.ref.table)
    changed = [value, *table[column].to_pylist()[1:]]
    table = table.set_column(table.schema.get_field_index(column), column, pa.array(changed))
    memory_store.write_table(pin.ref.table, table, table_metadata(table))
    with pytest.raises(PairmillError, match=told):
        make_plan(memory_store, [pin], SPEC)


def test_sizes_that_are_missing_are_counted(memory_store: Store) -> None:
    pin = shards(memory_store)[0]
    table = memory_store.read_table(pin.ref.table)
    table = table.set_column(table.schema.get_field_index("width"), "width", pa.array([None, 0, -3] + [96] * 21))
    memory_store.write_table(pin.ref.table, table, table_metadata(table))
    assert make_plan(memory_store, [pin], SPEC)[1] == {"no_size": 3}


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([4, 16, 64, 196]))
def test_grids_keep_to_the_budget_and_near_the_aspect(width: int, height: int, budget: int) -> None:
    h, w = grid_of(width, height, budget)
    assert 1 <= h * w <= budget
    if max(width, height) <= 3 * min(width, height) and budget >= 64:
        assert abs(math.log(w * height / (h * width))) < 0.13 and h * w >= 0.75 * budget


def test_a_square_gets_the_square_grid() -> None:
    assert grid_of(300, 300, 64) == (8, 8) and grid_of(200, 100, 64) == (5, 10) and grid_of(9999, 3, 64) == (1, 64)


def test_tokens_are_cut_counted_and_numbered_by_what_the_model_sees() -> None:
    tokeniser = Tokeniser(8)
    numbers = [tokeniser.number(t) for t in ("A red box", "a red  box", "a blue box", "word " * 20)]
    assert numbers[0] == numbers[1] != numbers[2] and tokeniser.truncated == 1
    tokens = tokeniser.tokens()
    assert len(tokens.ids[numbers[3]]) == 8
    assert (
        tokens.used[tokens.ids[numbers[0]]].tolist()
        == encode("a red box", 8)[0].tolist()
        == [49406, 320, 736, 2063, 49407]
    )
