"""Tables turned into numbers, against scikit-learn and pandas; batches, against indexing."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from common.errors import UserError
from common.loading import orders
from common.loading.loader import Loader
from common.tables.numbers import MANY, TableDataset, ToUnits, row_numbers, standardised

RNG = np.random.default_rng(0)
NUMBERS = pd.DataFrame({"a": RNG.normal(5, 3, 40), "b": RNG.integers(0, 9, 40), "c": RNG.random(40) < 0.5})


def test_numbers_have_mean_0_and_deviation_1_of_the_first_table():
    train, other = NUMBERS[:30], NUMBERS[30:]
    scaler = StandardScaler().fit(train.astype(float))
    found = standardised(train, other)
    assert all(part.dtype == np.float32 for part in found)
    assert np.allclose(found[0], scaler.transform(train.astype(float)), atol=1e-6)
    assert np.allclose(found[1], scaler.transform(other.astype(float)), atol=1e-6)


def test_a_column_that_is_always_the_same_is_0():
    """Three times 0.1 has a standard deviation of 1e-17 from rounding; divided by it, another value would be 7e15."""
    for same in ([3.0, 3.0], [0.1, 0.1, 0.1], [0.1, np.nextafter(0.1, 1)], [1e9 + 0.1] * 1001, [np.nan, np.nan], [7]):
        train, test = standardised(pd.DataFrame({"a": same}), pd.DataFrame({"a": [0.2, 1e9]}))
        assert not train[:, 0].any() and not test[:, 0].any()
    assert ToUnits(np.full((3, 1), 0.1))(torch.ones(1, 1)).item() == pytest.approx(1.1)


def test_a_text_is_a_column_and_one_that_only_others_have_is_none():
    train, test = pd.DataFrame({"t": ["red", "blue", "red"]}), pd.DataFrame({"t": ["blue", "green"]})
    for kind in ("str", "category", object):
        found = standardised(train.astype({"t": kind}), test.astype({"t": kind}))
        assert found[0].tolist() == pd.get_dummies(train["t"]).astype(float).to_numpy().tolist()
        assert found[1].tolist() == [[1, 0], [0, 0]]


def test_a_blank_is_0_and_a_column_says_so():
    train = pd.DataFrame({"n": [1.0, np.nan, 3.0], "t": ["x", None, "y"]})
    test = pd.DataFrame({"n": [np.nan], "t": [None]})
    numbers = [[-1, 0, 1, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 1, 0]]
    assert standardised(train, test)[0].tolist() == numbers and standardised(train, test)[1].tolist() == [
        [0, 1, 0, 0, 1]
    ]
    whole = standardised(train.astype({"n": "Int64"}), test.astype({"n": "Int64"}))
    assert whole[0].tolist() == numbers, "whole numbers with blanks"
    assert not standardised(train, pd.DataFrame({"n": [None], "t": [np.nan]}))[1][0, [0, 2, 3]].any(), "all are blank"
    assert standardised(train[:1], test)[1].tolist() == [[0, 0]], "no column where the first table has no blanks"


@pytest.mark.parametrize(
    ("train", "test", "words"),
    [
        ({"a": [1.0]}, {"b": [1.0]}, "column a is not in every table"),
        ({"a": [1.0]}, {"a": ["one"]}, "column a has numbers in one table and texts in another"),
        ({"a": ["1", "x"]}, {"a": [1, 1]}, "column a has numbers in one table and texts in another"),
        ({"a": [1.0, np.inf]}, {"a": [1.0]}, "column a holds an infinite value"),
        ({"a": [f"{n}" for n in range(MANY + 1)]}, {"a": ["1"]}, f"column a has {MANY + 1:,} different texts"),
    ],
)
def test_what_makes_no_numbers_is_named(train, test, words):
    with pytest.raises(UserError, match=words):
        standardised(pd.DataFrame(train), pd.DataFrame(test))


def test_tables_that_stay_as_they_are_may_have_any_texts_but_one_kind_of_cells():
    sellers = pd.DataFrame({"a": [f"{n}" for n in range(MANY + 1)]})
    train, test = row_numbers(sellers, sellers[:2])
    assert train.tolist() == list(range(MANY + 1)) and test.tolist() == [0, 1]
    with pytest.raises(UserError, match="column a has numbers in one table and texts in another"):
        row_numbers(sellers, pd.DataFrame({"a": [1, 2]}))


def test_batches_are_the_rows():
    inputs, targets = {"x": RNG.random((10, 3), np.float32), "n": np.arange(10)}, RNG.random((10, 1), np.float32)
    rows = np.array([7, 1, 4, 4, 2])
    with Loader(TableDataset(inputs, targets), orders.sequential(rows), 3, seed=0) as loader:
        batches = list(loader.epoch(0))
    assert np.array_equal(torch.cat([batch.inputs["x"] for batch in batches]), inputs["x"][rows])
    assert np.array_equal(torch.cat([batch.inputs["n"] for batch in batches]), rows)
    assert np.array_equal(torch.cat([batch.targets for batch in batches]), targets[rows])
    assert len(TableDataset(inputs)) == 10 and TableDataset(inputs).batch(rows, None)[1].shape == (5, 0)
    with pytest.raises(UserError, match="10 rows have 9 targets"):
        TableDataset(inputs, targets[:9])


def test_outputs_get_the_units_of_the_targets():
    targets = np.stack([RNG.normal(1000, 50, 99), np.full(99, 7.0)], axis=1).astype(np.float32)
    layer, outputs = ToUnits(targets), torch.randn(5, 2)
    assert np.allclose(layer(outputs), outputs.numpy() * [targets[:, 0].std(), 1] + targets.mean(0), rtol=1e-5)
    other = ToUnits(targets + 1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(outputs), layer(outputs)) and not list(layer.parameters())


def test_unknown_targets_do_not_count_in_the_units():
    targets = RNG.normal(1000, 50, (99, 2)).astype(np.float32)
    holed = np.concatenate([targets, np.full((50, 2), np.nan, np.float32)])
    assert torch.equal(ToUnits(holed)(torch.ones(1, 2)), ToUnits(targets)(torch.ones(1, 2)))
