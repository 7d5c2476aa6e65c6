import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import TimeSeriesSplit

from common.errors import UserError
from common.loading import folds

IDS = [f"{number:05d}.jpg" for number in range(503)]
GENERATOR = np.random.default_rng(0)
CLASSES = GENERATOR.choice(["a", "b", "c", "d"], len(IDS), p=[0.6, 0.3, 0.08, 0.02])
LABELS = (GENERATOR.random((len(IDS), 4)) < [0.5, 0.3, 0.2, 0.05]).astype(int)
GROUPS = GENERATOR.integers(0, 60, len(IDS))
MAKERS = {
    "kfold": lambda rows, seed: folds.kfold([IDS[row] for row in rows], 5, seed),
    "stratified": lambda rows, seed: folds.stratified([IDS[row] for row in rows], CLASSES[rows], 5, seed),
    "multilabel": lambda rows, seed: folds.multilabel_stratified([IDS[row] for row in rows], LABELS[rows], 5, seed),
    "grouped": lambda rows, seed: folds.grouped(GROUPS[rows], 5, seed),
}
ALL = np.arange(len(IDS))


@pytest.mark.parametrize("maker", MAKERS)
def test_folds_do_not_depend_on_the_file_order_but_on_the_seed(maker):
    make = MAKERS[maker]
    straight = make(ALL, 0)
    shuffled = np.random.default_rng(1).permutation(ALL)
    np.testing.assert_array_equal(make(shuffled, 0), straight[shuffled])
    np.testing.assert_array_equal(make(ALL, 0), straight)
    assert (make(ALL, 1) != straight).mean() > 0.3
    assert set(straight) == set(range(5))


@settings(max_examples=25)
@given(st.integers(2, 7), st.integers(0, 10), st.lists(st.integers(0, 3), min_size=7, max_size=60))
def test_stratified_counts_differ_by_at_most_one(count, seed, classes):
    made = folds.stratified(range(len(classes)), classes, count, seed)
    sizes = np.bincount(made, minlength=count)
    assert sizes.max() - sizes.min() <= 1
    for name in set(classes):
        within = np.bincount(made[np.array(classes) == name], minlength=count)
        assert within.max() - within.min() <= 1


def test_multilabel_rates_are_within_a_percent_where_plain_folds_are_not():
    def worst(made):
        return max(abs(LABELS[made == fold].mean(0) - LABELS.mean(0)).max() for fold in range(5))

    assert worst(MAKERS["multilabel"](ALL, 0)) < 0.01
    assert worst(MAKERS["kfold"](ALL, 0)) > 0.03


def test_groups_stay_together_and_folds_are_about_equal():
    made = MAKERS["grouped"](ALL, 0)
    for group in set(GROUPS):
        assert len(set(made[group == GROUPS])) == 1
    sizes = np.bincount(made)
    assert sizes.max() - sizes.min() <= np.bincount(GROUPS).max()


@pytest.mark.parametrize("splits, length, gap", [(2, 10, 0), (3, 10, 4), (5, 7, 12)])
def test_time_splits_are_those_of_scikit_learn_on_regular_times(splits, length, gap):
    times = np.random.default_rng(0).permutation(100)
    rows_by_time = np.argsort(times)
    reference = TimeSeriesSplit(splits, test_size=length, gap=gap).split(np.arange(100))
    for (train, held), (train_times, held_times) in zip(
        folds.time_splits(times, splits, length, gap), reference, strict=True
    ):
        np.testing.assert_array_equal(train, rows_by_time[train_times])
        np.testing.assert_array_equal(held, rows_by_time[held_times])


def test_time_splits_keep_their_distance_on_irregular_dates():
    hours = np.sort(np.random.default_rng(0).integers(0, 2000, 300))
    times = np.datetime64("2018-03-01T00") + hours.astype("timedelta64[h]")
    for train, held in folds.time_splits(times, 3, np.timedelta64(48, "h"), np.timedelta64(24, "h")):
        assert times[held].min() - times[train].max() > np.timedelta64(24, "h")
        assert times[held].max() - times[held].min() < np.timedelta64(48, "h")
    with pytest.raises(UserError, match="do not fit"):
        folds.time_splits(times, 50, np.timedelta64(48, "h"), np.timedelta64(24, "h"))


def test_fingerprint_and_saved_folds(tmp_path):
    made = MAKERS["kfold"](ALL, 0)
    backwards = ALL[::-1]
    folds.write_csv(tmp_path / "folds.csv", made, IDS)
    read = folds.read_csv(tmp_path / "folds.csv", [IDS[row] for row in backwards])
    np.testing.assert_array_equal(read, made[backwards])
    mark = folds.fingerprint(made, IDS)
    assert folds.fingerprint(read, [IDS[row] for row in backwards]) == mark
    made[7] = (made[7] + 1) % 5
    assert folds.fingerprint(made, IDS) != mark
    with pytest.raises(UserError, match="no fold for 1 of 2 ids, first new"):
        folds.read_csv(tmp_path / "folds.csv", [IDS[0], "new"])


def test_what_cannot_be_split_is_refused():
    with pytest.raises(UserError, match="a comes twice"):
        folds.kfold(["a", "b", "a"], 2, 0)
    with pytest.raises(UserError, match="cannot fill 5 folds"):
        folds.kfold(["a", "b"], 5, 0)
    with pytest.raises(UserError, match="of 0 and 1"):
        folds.multilabel_stratified(IDS, GROUPS, 5, 0)


def test_large_groups_are_dealt_first():
    """Dealt in the order of their names, the small ones would leave no way to balance the large one."""
    groups = np.repeat(np.arange(9), [8, 1, 1, 1, 1, 1, 1, 1, 1])
    assert all(np.bincount(folds.grouped(groups, 2, seed)).tolist() == [8, 8] for seed in range(9))
