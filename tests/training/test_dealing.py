"""Dealing: everything once, equal counts, and sums as near as whole items allow."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.dealing import deal


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 77)), min_size=1, max_size=120), st.integers(1, 9))
def test_each_item_once_in_bins_of_equal_counts(items: list[tuple[int, int]], bins: int) -> None:
    dealt = deal(np.array(items), bins)
    assert sorted(dealt[dealt >= 0]) == list(range(len(items)))
    counts = (dealt >= 0).sum(1)
    assert dealt.shape[0] == bins and counts.max() - counts.min() <= 1


@given(st.lists(st.integers(1, 500), min_size=8, max_size=120), st.integers(2, 8))
def test_sums_differ_by_no_more_than_an_item(sizes: list[int], bins: int) -> None:
    dealt = deal(np.array(sizes)[:, None], bins)
    sums = [sum(sizes[i] for i in share if i >= 0) for share in dealt]
    assert max(sums) - min(sums) <= max(sizes)


def test_several_parts_are_levelled_together() -> None:
    draw = np.random.default_rng(0)
    sizes = np.stack([draw.integers(30, 65, 1024), draw.geometric(0.1, 1024) + 2], axis=1)
    sums = sizes[deal(sizes, 16)].sum(1)
    assert np.ptp(sums[:, 0]) <= 10 and np.ptp(sums[:, 1]) <= 4  # of 3,000 and 770


@pytest.mark.parametrize("bins", [1, 2, 3])
def test_the_example(bins: int) -> None:
    sums = {1: [12], 2: [6, 6], 3: [5, 4, 3]}
    dealt = deal(np.array([[5], [4], [2], [1]]), bins)
    assert sorted((sum([5, 4, 2, 1][i] for i in share if i >= 0) for share in dealt), reverse=True) == sums[bins]
