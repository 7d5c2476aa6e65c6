import csv

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

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
    "stratified grouped": lambda rows, seed: folds.stratified_grouped(CLASSES[rows], GROUPS[rows], 5, seed),
    "stratified grouped labels": lambda rows, seed: folds.stratified_grouped(LABELS[rows], GROUPS[rows], 5, seed),
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
    assert (folds.multilabel_stratified(IDS, LABELS[:, :1], 5, 0) == folds.stratified(IDS, LABELS[:, 0], 5, 0)).all()


def test_groups_stay_together_and_folds_are_about_equal():
    made = MAKERS["grouped"](ALL, 0)
    for group in set(GROUPS):
        assert len(set(made[group == GROUPS])) == 1
    sizes = np.bincount(made)
    assert sizes.max() - sizes.min() <= np.bincount(GROUPS).max()


@pytest.mark.parametrize("sizes", ["equal", "few and skewed"])
def test_stratified_groups_are_better_balanced_than_those_of_scikit_learn(sizes):
    """Compares sums over folds, classes and all rows of squared deviations from an equal share, on twenty data sets."""
    found = {"own": [], "scikit-learn": []}
    for seed in range(20):
        random = np.random.default_rng(seed)
        count = 300 if sizes == "equal" else 40
        sizes_of = np.ones(count) if sizes == "equal" else random.pareto(3, count) + 0.1
        groups = random.choice(count, 2000, p=sizes_of / sizes_of.sum())
        rates = random.dirichlet((2, 0.8, 0.3), count)[groups]
        labels = np.array(["a", "b", "c"])[(rates.cumsum(1) > random.random((2000, 1))).argmax(1)]
        other = np.empty(2000, int)
        for fold, (_, held) in enumerate(
            StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(groups, labels, groups)
        ):
            other[held] = fold
        made = folds.stratified_grouped(labels, groups, 5, seed)
        assert all(len(set(made[groups == group])) == 1 for group in set(groups))
        for name, of in (("own", made), ("scikit-learn", other)):
            kinds = [labels == label for label in "abc"] + [labels != ""]
            parts = np.array([[(of[kind] == fold).mean() for kind in kinds] for fold in range(5)])
            found[name].append(float(np.square(parts - 0.2).sum()))
    ratio = np.divide(found["own"], found["scikit-learn"])
    assert np.mean(ratio) < (0.4 if sizes == "equal" else 0.9) and np.median(ratio) < 0.9


def test_stratified_groups_of_many_labels():
    made = MAKERS["stratified grouped labels"](ALL, 0)
    assert max(abs(LABELS[made == fold].mean(0) - LABELS.mean(0)).max() for fold in range(5)) < 0.02
    assert all(len(set(made[group == GROUPS])) == 1 for group in set(GROUPS))


def test_fingerprint_and_saved_folds(tmp_path):
    made = MAKERS["kfold"](ALL, 0)
    backwards = ALL[::-1]
    folds.write_csv(tmp_path / "folds.csv", made, IDS)
    with open(tmp_path / "folds.csv", newline="") as stream:
        read = list(csv.reader(stream))
    assert read == [["id", "fold"], *([name, str(fold)] for name, fold in zip(IDS, made, strict=True))]
    folds.write_csv(tmp_path / "folds.csv", [0, 1], ["=cmd|' /C calc'!A0", "a=1"])
    assert (tmp_path / "folds.csv").read_text() == "id,fold\n'=cmd|' /C calc'!A0,0\na=1,1\n"
    mark = folds.fingerprint(made, IDS)
    assert folds.fingerprint(made[backwards], [IDS[row] for row in backwards]) == mark
    made[7] = (made[7] + 1) % 5
    assert folds.fingerprint(made, IDS) != mark


def test_what_cannot_be_split_is_refused():
    with pytest.raises(UserError, match="a comes twice"):
        folds.kfold(["a", "b", "a"], 2, 0)
    with pytest.raises(UserError, match="cannot fill 5 folds"):
        folds.kfold(["a", "b"], 5, 0)
    with pytest.raises(UserError, match="a comes twice"):
        folds.kfold(pd.Series(["a", "b", "a"], index=[7, 8, 9]), 2, 0)
    for count in (0, -2):
        with pytest.raises(UserError, match=f"cannot fill {count} folds"):
            folds.kfold(["a", "b"], count, 0)
    for split in (
        lambda: folds.stratified(list("abcd"), [0, 1, 0, 1, 1], 2, 0),
        lambda: folds.stratified(list("abcd"), [0, 1], 2, 0),
        lambda: folds.multilabel_stratified(list("abcd"), np.eye(5)[:, :2], 2, 0),
        lambda: folds.stratified_grouped([0], list("abcd"), 2, 0),
        lambda: folds.stratified_grouped([0, 1, 0, 1, 1], list("abcd"), 2, 0),
    ):
        with pytest.raises(UserError, match="for . rows: expected one of each for every row"):
            split()
    with pytest.raises(UserError, match=r"array \[3, 2\]: expected one name for every row"):
        folds.grouped([(1, 2), (1, 3), (1, 2)], 2, 0)
    with pytest.raises(UserError, match="of 0 and 1"):
        folds.multilabel_stratified(IDS, GROUPS, 5, 0)


@pytest.mark.parametrize("groups", [["a", None, "b", "c"], [1.0, None, 2.0, 3.0]])
def test_a_blank_is_no_group_and_no_class(groups):
    groups = pd.Series(groups)
    for split in (
        lambda: folds.grouped(groups, 2, 0),
        lambda: folds.stratified(list("abcd"), groups, 2, 0),
        lambda: folds.stratified_grouped(groups, list("abcd"), 2, 0),
        lambda: folds.stratified_grouped([0, 1, 0, 1], groups, 2, 0),
    ):
        with pytest.raises(UserError, match="row 1 .of 4, the first is 0. has no (group|label): give it one"):
            split()


def test_large_groups_are_dealt_first():
    """If small groups were dealt first, nothing would be left to balance the large one."""
    groups = np.repeat(np.arange(9), [8, 1, 1, 1, 1, 1, 1, 1, 1])
    assert all(np.bincount(folds.grouped(groups, 2, seed)).tolist() == [8, 8] for seed in range(9))
