"""Blends against slow loops and grids; weights are never chosen on the rows that they are scored on."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import gmean, rankdata
from sklearn.linear_model import LogisticRegression, Ridge

from common import ensemble, metrics
from common.ensemble import PLAIN, RANKS, Weighted, maximise, nested, power
from common.errors import UserError

RNG = np.random.default_rng(0)
M, C = 200, 3
CLASS = RNG.integers(0, C, M)
LOGITS = 2 * np.eye(C)[CLASS] + RNG.normal(0, 1, (4, M, C)) + RNG.normal(0, 1, (M, C))
MEMBERS = (np.exp(LOGITS) / np.exp(LOGITS).sum(2, keepdims=True)).astype(np.float32)
ROWS, PARTS = np.arange(M), np.arange(M) % 4
LOSS = maximise(metrics.log_loss(), CLASS)
WORTH = maximise(metrics.accuracy(), CLASS)
WEIGHTS = np.array([0.4, 0.1, 0.3, 0.2])


def test_means_in_every_space():
    def close(space, expected):
        np.testing.assert_allclose(Weighted(WEIGHTS, space)(MEMBERS), expected, rtol=2e-5)

    each = WEIGHTS[:, None, None]
    close(PLAIN, (each * MEMBERS).sum(0))
    close(power(0), gmean(MEMBERS, axis=0, weights=np.broadcast_to(each, MEMBERS.shape)))
    close(power(3), (each * MEMBERS**3).sum(0) ** (1 / 3))
    close(power(-1), 1 / (each / MEMBERS).sum(0))
    ranked = np.stack([[rankdata(run[:, c]) for c in range(C)] for run in MEMBERS]).transpose(0, 2, 1) / M
    close(RANKS, (each * ranked).sum(0))
    np.testing.assert_array_equal(ensemble.equal()(MEMBERS, ROWS).weights, np.full(4, 0.25))


def climb_slowly(rounds, worth):
    """Greedy hill climbing that computes the mean of all chosen runs anew for every candidate."""
    chosen, best = [], (-np.inf, None)
    for _ in range(rounds):
        scores = [worth(MEMBERS[[*chosen, run]].astype(np.float64).mean(0)) for run in range(4)]
        chosen.append(int(np.argmax(scores)))
        if max(scores) > best[0]:
            best = max(scores), np.bincount(chosen, minlength=4) / len(chosen)
    return best


@pytest.mark.parametrize("objective", [LOSS, WORTH])
def test_hill_climbing_is_carucanas_and_ends_early(objective):
    score, weights = climb_slowly(12, lambda blend: objective(blend, ROWS))
    found = ensemble.hill_climbing(objective, rounds=12, patience=12)(MEMBERS, ROWS)
    np.testing.assert_allclose(found.weights, weights)
    assert objective(found(MEMBERS), ROWS) == pytest.approx(score, rel=1e-5)
    calls = []
    ensemble.hill_climbing(lambda blend, rows: calls.append(1) or -len(calls), patience=3)(MEMBERS, ROWS)
    assert len(calls) == 4 * 4, "the first round and three that are no better"


def test_optimum_is_that_of_a_grid():
    steps = [w for w in product(np.linspace(0, 1, 21), repeat=3) if sum(w) <= 1]
    grid = max(LOSS(Weighted(np.array([*w, 1 - sum(w)]))(MEMBERS), ROWS) for w in steps)
    found = ensemble.optimum(LOSS)(MEMBERS, ROWS)
    assert found.weights.sum() == pytest.approx(1) and found.weights.min() >= 0
    assert LOSS(found(MEMBERS), ROWS) > grid - 2e-4
    assert ensemble.optimum(LOSS)(MEMBERS[:1], ROWS).weights.tolist() == [1.0]


def test_least_squares_has_no_negative_weight():
    rows = ROWS[20:]
    flat, truth = MEMBERS[:, rows].reshape(4, -1).astype(float), np.eye(C)[CLASS[rows]].ravel()
    slow = minimize(lambda w: np.square(w @ flat - truth).sum(), np.full(4, 0.25), bounds=[(0, None)] * 4, tol=1e-12).x
    for targets in (CLASS, np.eye(C)[CLASS]):
        found = ensemble.least_squares(targets)(MEMBERS[:, rows], rows).weights
        np.testing.assert_allclose(found, slow / slow.sum(), atol=1e-4)
    holes = np.eye(C)[CLASS]
    holes[30:90] = np.nan
    others = np.r_[0:30, 90:M]
    np.testing.assert_allclose(
        ensemble.least_squares(holes)(MEMBERS, ROWS).weights,
        ensemble.least_squares(CLASS)(MEMBERS[:, others], others).weights,
    )
    assert ensemble.least_squares(np.zeros((M, C)))(MEMBERS, ROWS).weights.tolist() == [0.25] * 4, (
        "nothing to choose by"
    )
    with pytest.raises(UserError, match="no run gets a positive weight"):
        ensemble.least_squares(-np.ones((M, C)))(MEMBERS, ROWS)
    with pytest.raises(UserError, match="do not fit targets"):
        ensemble.least_squares(np.ones((M, C + 1)))(MEMBERS, ROWS)


def test_classes_have_weights_of_their_own():
    truth = CLASS[:, None] == np.arange(C)
    spoilt = MEMBERS.copy()
    spoilt[0, :, 1] = RNG.random(M)
    spoilt[3, :, 0] = RNG.random(M)

    def of(label):
        return ensemble.hill_climbing(maximise(metrics.roc_auc(), truth[:, label]))

    found = ensemble.per_class(of)(spoilt, ROWS)
    assert found.weights.shape == (4, C)
    assert found.weights[0, 1] < 0.1 and found.weights[3, 0] < 0.1
    expected = np.stack([(found.weights[:, c, None] * spoilt[:, :, c]).sum(0) for c in range(C)], axis=1)
    np.testing.assert_allclose(found(spoilt), expected, rtol=1e-5)
    objective = maximise(metrics.roc_auc(), truth)
    blend = nested(spoilt, PARTS, ensemble.per_class(of), objective)
    np.testing.assert_array_equal(blend.weights, found.weights)
    assert blend.score > nested(spoilt, PARTS, ensemble.equal(), objective, leave_out=False).score


def test_rows_have_no_part_in_what_they_are_scored_by():
    for part in range(4):
        other = CLASS.copy()
        other[part == PARTS] = RNG.integers(0, C, 50)
        for of in (
            lambda truth: ensemble.hill_climbing(maximise(metrics.log_loss(), truth)),
            lambda truth: ensemble.optimum(maximise(metrics.log_loss(), truth)),
            lambda truth: ensemble.least_squares(truth),
            lambda truth: ensemble.stacked(Ridge(), np.eye(C)[truth]),
        ):
            one, two = (nested(MEMBERS, PARTS, of(truth), LOSS_ANY, False).predictions for truth in (CLASS, other))
            np.testing.assert_array_equal(one[part == PARTS], two[part == PARTS])
            assert not np.array_equal(one, two)


def LOSS_ANY(predictions, rows):
    return float(predictions.sum())


def test_noise_gains_nothing():
    """A blend of sixty runs of noise has a good AUC on the rows that it was chosen on, but not out of fold."""
    truth, noise = RNG.integers(0, 2, M), RNG.random((60, M)).astype(np.float32)
    objective = maximise(metrics.roc_auc(), truth)
    blend = nested(noise, PARTS, ensemble.hill_climbing(objective), objective, leave_out=False)
    assert objective(blend.fitted(noise), ROWS) > 0.6
    assert abs(blend.score - 0.5) < 0.1


def test_what_is_told_of_a_blend():
    choose = ensemble.hill_climbing(LOSS)
    blend = nested(MEMBERS, PARTS, choose, LOSS)
    np.testing.assert_array_equal(blend.weights, choose(MEMBERS, ROWS).weights)
    assert blend.score == LOSS(blend.predictions, ROWS) and blend.mean == LOSS(MEMBERS.mean(0), ROWS)
    assert blend.members.tolist() == [LOSS(run, ROWS) for run in MEMBERS]
    assert blend.score > blend.members.max()
    for run in range(4):
        rest = nested(np.delete(MEMBERS, run, 0), PARTS, choose, LOSS, leave_out=False)
        assert blend.without[run] == rest.score and rest.without is None
    np.testing.assert_allclose(blend.correlation, np.corrcoef(MEMBERS.reshape(4, -1)))
    test = RNG.random((4, 7, C)).astype(np.float32)
    np.testing.assert_allclose(blend.fitted(test), np.tensordot(blend.weights, test, 1), rtol=1e-5)


def test_stack_of_logistic_regression():
    model = LogisticRegression(max_iter=500)
    blend = nested(MEMBERS, PARTS, ensemble.stacked(model, CLASS), LOSS, leave_out=False)
    flat = MEMBERS.transpose(1, 0, 2).reshape(M, -1)
    for part in range(4):
        held = part == PARTS
        expected = model.fit(flat[~held], CLASS[~held]).predict_proba(flat[held])
        np.testing.assert_allclose(blend.predictions[held], expected, rtol=1e-5)
    assert blend.weights is None and blend.score > blend.members.max()


def test_a_stack_knows_the_classes_that_a_part_lacks():
    """The third class is in part 0 alone, so a stack fitted without part 0 has never seen it."""
    rare = np.where((CLASS == 2) & (PARTS != 0), 0, CLASS)
    predictions = nested(MEMBERS, PARTS, ensemble.stacked(LogisticRegression(), rare), LOSS, False).predictions
    assert (predictions[PARTS == 0, 2] == 0).all() and (predictions[PARTS != 0, 2] > 0).all()
    np.testing.assert_allclose(predictions.sum(1), 1, rtol=1e-5)
    for targets, words in ((0 * CLASS, "classes"), (CLASS - 1, "targets -1 to 1"), (CLASS * np.nan, "NaN")):
        with pytest.raises(UserError, match=words):
            ensemble.stacked(LogisticRegression(), targets)(MEMBERS, ROWS)


def test_a_blend_may_need_a_run():
    """The second run predicts the opposite, so there is no blend without the first, and no score for leaving it out."""
    truth = RNG.normal(size=M)
    objective = maximise(metrics.rmse(), truth)
    blend = nested(np.stack([truth, -truth]), PARTS, ensemble.least_squares(truth), objective)
    assert blend.weights.tolist() == [1, 0] and blend.score == 0
    assert np.isnan(blend.without[0]) and blend.without[1] == 0


def test_objectives_grow_and_see_the_rows_they_are_asked_for():
    assert LOSS(MEMBERS[0], ROWS) == -metrics.log_loss().score(MEMBERS[0], CLASS)
    tree = {"y": torch.from_numpy(CLASS), "w": (CLASS, np.ones(M))}
    objective = maximise(metrics.accuracy().on(lambda d, t: (d["labels"], t["y"])), tree, lambda p: {"labels": p})
    rows = ROWS[5:90]
    assert objective(MEMBERS[1][rows], rows) == WORTH(MEMBERS[1][rows], rows)
    one_class = maximise(metrics.roc_auc(), np.ones(M))
    assert one_class(MEMBERS[0, :, 0], ROWS) == -np.inf


def test_what_cannot_be_blended_is_refused():
    choose = ensemble.hill_climbing(LOSS)
    with pytest.raises(UserError, match="two runs or more"):
        nested(MEMBERS[:1], PARTS, choose, LOSS)
    with pytest.raises(UserError, match="hold out a single one: train them with --fold all"):
        nested(MEMBERS, 0 * PARTS, choose, LOSS)
    with pytest.raises(UserError, match="expected finite"):
        nested(np.where(MEMBERS > 0.9, np.nan, MEMBERS), PARTS, choose, LOSS)
    with pytest.raises(UserError, match="folds of"):
        nested(MEMBERS, PARTS[1:], choose, LOSS)
