"""The plan: every pair once per epoch, on any number of ranks, from the tables alone."""

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairs.errors import PairmillError
from pairs.shard import ShardRef
from pairs.store import Store
from pairs.workspace import Workspace
from tests.training.small import SPEC, pair, shards
from training.plan import Cost, Plan, grid_of, steps_of
from training.tables import make_plan
from training.tokens import Tokeniser, encode

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
            sum(COST(1 + math.prod(plan.grid(r)), len(plan.tokens.ids[plan.text(e, r)])) for e, r in part)
            for part in parts
        ]
        assert max(loads) <= 1.25 * sum(loads) / ranks


def test_the_order_hangs_on_seed_and_shards_not_on_ranks(memory_store: Store) -> None:
    pins = shards(memory_store)
    plans = [make_plan(memory_store, pins, SPEC.model_copy(update=u))[0] for u in ({}, {"workers": 4}, {"seed": 1})]
    assert plans[0].fingerprint == plans[1].fingerprint != plans[2].fingerprint
    assert plans[0].digest(3) == plans[1].digest(3) != plans[2].digest(3)


def test_steps_of_finds_the_steps_that_took_a_uid(plan: Plan) -> None:
    uid = plan.uids[17]
    expected = [s for s in range(20) if any(plan.uids[row] == uid for _, row in plan.rows(s))]
    assert list(steps_of(plan, uid, 20)) == expected and len(expected) >= 4
    assert list(steps_of(plan, "0" * 32, 20)) == []


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
