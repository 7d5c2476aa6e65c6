"""Thresholds of labels against slow loops and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import fbeta_score

from common.thresholds import UNKNOWN, best_f_beta, decide, matching


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    truth = rng.random((60, 5)) < (0.5, 0.3, 0.1, 0.03, 0.0)
    scores = np.clip(0.4 * truth + rng.random((60, 5)) * 0.6, 0, 1).astype(np.float32).round(2)  # with ties
    truth[0, 3] = True
    return scores, truth


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("change", [lambda p: p, lambda p: p - 2, lambda p: np.maximum(p - 0.3, 0)])
def test_the_best_threshold_is_that_of_a_slow_search(scored, beta, change):
    """For probabilities, for scores below 0 such as logits, and for scores of which many are exactly 0."""
    scores, truth = change(scored[0]), scored[1]
    truth[:, 0] |= np.arange(len(truth)) % 5 > 0  # so frequent that predicting it for all rows is best
    found = best_f_beta(scores, truth, beta)
    for label in range(4):
        tried = [
            fbeta_score(truth[:, label], scores[:, label] > level, beta=beta, zero_division=0)
            for level in np.unique(scores[:, label]) - 1e-3
        ]
        own = fbeta_score(truth[:, label], scores[:, label] > found[label], beta=beta)
        assert own == pytest.approx(max(tried))
    assert found[4] == UNKNOWN, "nobody has it"


def test_scores_that_are_all_zero_have_a_threshold():
    assert np.isfinite(best_f_beta(np.zeros((4, 1)), np.ones((4, 1)))).all()


def test_labels_come_as_often_as_they_should():
    scores = np.random.default_rng(1).random((200, 3))
    rates = np.array([0.0, 0.25, 1.0])
    assert np.allclose((scores > matching(scores, rates)).mean(0), rates)


def test_every_row_has_at_least_the_label_that_comes_nearest():
    found = decide(torch.tensor([[0.1, 0.45, 0.2], [0.6, 0.1, 0.9]]), [0.5, 0.7, 0.5])
    assert found.tolist() == [[False, True, False], [True, False, True]]
    found = decide(np.array([[0.1, 0.45, 0.3]]), [0.5, 0.7, 0.5])
    assert found.tolist() == [[False, False, True]], "0.2 below is nearer than 0.25"
