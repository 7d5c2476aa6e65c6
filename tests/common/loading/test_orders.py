import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from common.loading import orders


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 3))
@settings(max_examples=30)
def test_shuffled_is_a_permutation_of_its_own_for_every_epoch_and_seed(rows, seed, epoch):
    order = orders.shuffled(rows)
    assert sorted(order(seed, epoch).index) == list(range(rows))
    np.testing.assert_array_equal(order(seed, epoch).index, orders.shuffled(np.arange(rows))(seed, epoch).index)
    if rows > 20:
        assert (order(seed, epoch).index != order(seed, epoch + 1).index).any()
        assert (order(seed, epoch).index != order(seed + 1, epoch).index).any()


def test_orders_keep_to_the_given_rows():
    rows = np.array([9, 4, 7])
    assert orders.sequential(rows)(0, 0).index.tolist() == [9, 4, 7]
    assert sorted(orders.shuffled(rows)(0, 0).index) == [4, 7, 9]
    assert set(orders.weighted(np.array([1.0, 0, 3]), 100, rows)(0, 0).index) == {9, 7}
    assert sorted(orders.grouped(np.array(["a", "b", "a"]), rows)(0, 0).index) == [4, 7, 9]


def test_weighted_draws_with_the_given_rates_and_counts_repeats():
    weights = np.array([1.0, 0, 2, 7])
    plan = orders.weighted(weights, 20_000)(3, 1)
    rates = np.bincount(plan.index, minlength=4) / len(plan.index)
    np.testing.assert_allclose(rates, weights / weights.sum(), atol=0.01)
    seen = {}
    for index, draw in zip(plan.index.tolist(), plan.draw.tolist(), strict=True):  # count the repeats in a slow loop
        assert draw == seen.get(index, 0)
        seen[index] = draw + 1


@pytest.mark.parametrize("weights", [[1, -1], [0, 0], [np.nan, 1], [np.inf, 1]])
def test_weights_that_are_no_probabilities_are_refused(weights):
    with pytest.raises(UserError, match="sampling weights"):
        orders.weighted(np.array(weights, float))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 4))
@settings(max_examples=30)
def test_grouped_batches_hold_whole_groups(groups, groups_per_batch, epoch):
    groups = np.array(groups)
    plan = orders.grouped(groups, groups_per_batch=groups_per_batch)(0, epoch)
    bounds = plan.bounds(batch_size=4)
    for start, stop in zip(bounds, bounds[1:], strict=False):
        inside = plan.index[start:stop]
        assert len(set(groups[inside])) <= groups_per_batch
        assert sorted(inside) == sorted(np.flatnonzero(np.isin(groups, groups[inside])))
    assert sorted(plan.index) == list(range(len(groups)))


@pytest.mark.parametrize(
    "rows, size, expected", [(10, 4, [0, 4, 8, 10]), (8, 4, [0, 4, 8]), (3, 4, [0, 3]), (4, 4, [0, 4])]
)
def test_the_tail_is_a_batch(rows, size, expected):
    assert orders.sequential(rows)(0, 0).bounds(size).tolist() == expected


@given(st.integers(0, 50), st.integers(1, 9))
@settings(max_examples=100)
def test_shares_are_contiguous_and_never_half_of_a_pair(size, world):
    shards = [orders.shard(size, rank, world) for rank in range(world)]
    assert [place for start, stop in shards for place in range(start, stop)] == list(range(size))
    assert all(start % 2 == 0 or start == size for start, _ in shards)
    assert max(stop - start for start, stop in shards) - min(stop - start for start, stop in shards) <= 2 + size % 2


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="no rows"):
        orders.shuffled(np.array([], int))


@pytest.mark.parametrize(
    "rows", [np.arange(9) > 4, [True, False], np.array([0.0, 1.0]), np.array([2, -1]), np.array([[0, 1]])]
)
def test_what_is_no_list_of_row_numbers_is_refused(rows):
    """A boolean mask would be read as row numbers 0 and 1."""
    for make in (orders.shuffled, orders.sequential, lambda rows: orders.weighted(np.ones(len(rows)), rows=rows)):
        with pytest.raises(UserError, match=r"expected row numbers \[n\] from 0 up; of a mask .* np.flatnonzero"):
            make(rows)


def test_groups_that_fit_no_rows_are_refused():
    groups = np.arange(6) // 2
    for made in (
        lambda: orders.grouped(groups, rows=np.arange(3)),
        lambda: orders.grouped(groups[:3], rows=np.arange(6)),
        lambda: orders.grouped(groups, groups_per_batch=0),
    ):
        with pytest.raises(UserError, match="expected a group for every row"):
            made()
    with pytest.raises(UserError, match="row 1 .of 3, the first is 0. has no group"):
        orders.grouped(np.array([1.0, np.nan, np.nan]))


def test_groups_come_in_another_order_in_every_epoch():
    order = orders.grouped(np.arange(30) // 3)
    plans = [order(seed, epoch).index.tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert len(set(map(tuple, plans))) == 3


@pytest.mark.parametrize("bare", [2, 4])
def test_rarity_needs_a_label_in_every_row(bare):
    """Otherwise a row without a label would get the weight of the next row, and the last row none."""
    labels = np.eye(5)
    labels[bare] = 0
    with pytest.raises(UserError, match=f"1 rows have no label, the first is row {bare}"):
        orders.by_rarity(labels)
