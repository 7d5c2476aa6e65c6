import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.loading.keys import CPU, KeyedGenerator, Keys, inverse_normal, keyed_seed

numbers = st.integers(0, 2**40)


@settings(max_examples=40)
@given(
    st.integers(-(2**63), 2**64 - 1),
    numbers,
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=9),
    st.integers(0, 70),
    st.integers(0, 2**32),
)
def test_a_batch_draws_what_numpys_own_philox_draws_for_each_sample(seed, epoch, rows, count, stream):
    index, draw = np.array(rows).T
    drawn = Keys(seed, epoch, index, draw).uniform((count,), stream)
    for row, (i, d) in enumerate(rows):
        key, counter = np.array([seed % 2**64, epoch], np.uint64), np.array([0, d, i, stream], np.uint64)
        expected = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(count)
        np.testing.assert_array_equal(drawn[row], expected)
        np.testing.assert_array_equal(KeyedGenerator().jump(seed, epoch, i, d, stream).random(count), expected)


@settings(max_examples=20)
@given(st.integers(0, 2**63), st.integers(1, 40), st.integers(0, 40), st.sampled_from([(), (3,), (2, 5), (7, 7)]))
def test_numbers_do_not_depend_on_the_batching(seed, size, cut, shape):
    index = np.arange(100, 100 + size)
    whole, parts = Keys(seed, 3, index), [Keys(seed, 3, index[:cut]), Keys(seed, 3, index[cut:])]
    for draw in (Keys.uniform, Keys.normal, lambda keys, shape: keys.integers(-5, 17, shape)):
        np.testing.assert_array_equal(draw(whole, shape), np.concatenate([draw(part, shape) for part in parts]))


@pytest.mark.parametrize("shape", [(), (6,), (2, 5, 5)])
def test_a_card_draws_the_same_numbers(shape, monkeypatch):
    """The way of the words on a card, run on the CPU: never by numpy's own generator."""
    keys = [Keys(-7, 5, np.array([0, 3, 2**40]), 9) for _ in range(2)]
    uniform, normal = keys[0].uniform(shape), keys[0].normal(shape)
    monkeypatch.setattr("common.loading.keys.VECTOR_LIMIT", 10**9)
    assert torch.equal(keys[1].uniform_on(CPU, shape), torch.from_numpy(uniform))
    assert torch.equal(keys[1].normal_on(CPU, shape), torch.from_numpy(normal))


def test_the_inverse_of_a_card_is_that_of_scipy():
    words = np.random.default_rng(0).integers(0, 2**53, 200_000)
    places = (np.concatenate([np.arange(300), words, 2**53 - np.arange(2, 300)]) + 0.5) * 2.0**-53
    found, expected = inverse_normal(torch.from_numpy(places)), torch.from_numpy(stats.norm.ppf(places))
    torch.testing.assert_close(found, expected, rtol=4e-15, atol=0)


def test_a_state_left_in_the_middle_has_no_influence():
    keyed = KeyedGenerator()
    fresh = keyed.jump(1, 2, 3).integers(0, 100, 5, dtype=np.uint32)  # leaves half a word behind
    keyed.jump(1, 2, 4).standard_normal(7)
    np.testing.assert_array_equal(keyed.jump(1, 2, 3).integers(0, 100, 5, dtype=np.uint32), fresh)


def test_every_part_of_the_key_changes_the_numbers_and_unnamed_calls_are_fresh():
    base = Keys(1, 2, np.array([3])).uniform((4,), 0)
    others = [
        Keys(9, 2, np.array([3])),
        Keys(1, 9, np.array([3])),
        Keys(1, 2, np.array([9])),
        Keys(1, 2, np.array([3]), 9),
    ]
    drawn = [base, *(keys.uniform((4,), 0) for keys in others), Keys(1, 2, np.array([3])).uniform((4,), 1)]
    keys = Keys(1, 2, np.array([3]))
    drawn += [keys.uniform((4,)), keys.uniform((4,))]
    assert len({row.tobytes() for row in drawn}) == len(drawn)
    assert np.array_equal(Keys(1, 2, np.array([3])).uniform((4,)), drawn[-2])


def test_counters_of_numpy_are_those_of_python():
    found = Keys(np.int64(3), np.int64(1), np.arange(4)).uniform((2,), stream=0)
    assert np.array_equal(found, Keys(3, 1, np.arange(4)).uniform((2,), stream=0))
    assert KeyedGenerator().jump(np.int64(3), np.int64(1), 5).random() == KeyedGenerator().jump(3, 1, 5).random()


def test_distributions():
    keys = Keys(0, 0, np.arange(20_000))
    assert stats.kstest(keys.uniform(), "uniform").pvalue > 1e-3
    assert stats.kstest(keys.normal(), "norm").pvalue > 1e-3
    counts = np.bincount(keys.integers(0, 7), minlength=7)
    assert stats.chisquare(counts).pvalue > 1e-3
    pair = keys.uniform((2,))
    assert abs(np.corrcoef(pair.T)[0, 1]) < 0.03
    assert abs(np.corrcoef(pair[:-1, 0], pair[1:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("other", [(0, 0), (0, 1, 0), (1, 0), (0, -1), (2**32, 1), (0, 2**32 + 1), (0,)])
def test_keyed_seeds_differ(other):
    assert keyed_seed(*other) != keyed_seed(0, 1)
    assert 0 <= keyed_seed(*other) < 2**32
