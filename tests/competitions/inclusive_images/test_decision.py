"""Decisions compared with scikit-learn, slow loops and values worked out by hand."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.metrics import fbeta_score

from common.metrics import f_beta
from competitions.inclusive_images import decision
from competitions.inclusive_images.decision import Ranked, Rule
from competitions.inclusive_images.label_embedding import LabelEmbedding

F2 = f_beta(2, "samples")
ALONE = np.arange(30)
PRIOR = np.array([4, 2])


def scores_and_truth(n: int = 200, m: int = 30, seed: int = 0) -> tuple[np.ndarray, csr_matrix]:
    """Calibrated probabilities and labels drawn from them."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(0.2, 1.5, (n, m)).astype(np.float32)
    return scores, csr_matrix((rng.random((n, m)) < scores).astype(np.uint8))


def test_f2_equals_scikit_learn():
    rng = np.random.default_rng(0)
    found, truth = rng.random((300, 12)) < 0.2, rng.random((300, 12)) < 0.2
    found[:5], truth[3:8] = False, False
    wanted = fbeta_score(truth, found, beta=2, average="samples", zero_division=0)
    assert F2.score(found, truth) == pytest.approx(wanted, abs=1e-12)
    assert F2.score(found[:8], truth[:8]) == 0, "empty predictions, and images without labels"


def test_rules_by_hand():
    ranked = Ranked.of(np.array([[0.9, 0.1, 0.6, 0.5], [0.1, 0.2, 0.05, 0.0]]))
    assert ranked.columns[0].tolist() == [0, 2, 3, 1]
    assert decision.lengths_of(ranked, Rule("threshold", 0.5, 0, 4)).tolist() == [3, 0]
    assert decision.lengths_of(ranked, Rule("threshold", 0.5, 2, 2)).tolist() == [2, 2]
    assert decision.lengths_of(ranked, Rule("expected", 1.0, 0, 4)).tolist() == [3, 2]


def test_expected_rule_is_nearly_the_best_for_true_probabilities():
    scores, truth = scores_and_truth(4000)
    ranked = Ranked.of(scores)
    quality = decision.prefix_f2(ranked, truth, PRIOR)

    def mean(rule: Rule) -> float:
        return quality[np.arange(len(quality)), decision.lengths_of(ranked, rule)].mean()

    best_threshold = max(mean(Rule("threshold", level)) for level in np.linspace(0.05, 0.9, 40))
    assert mean(Rule("expected", 1.0)) > best_threshold - 0.002 > mean(Rule("threshold", 0.5)) + 0.02


def test_prefix_f2_equals_the_metric():
    scores, truth = scores_and_truth(50)
    ranked = Ranked.of(scores)
    table = decision.prefix_f2(ranked, truth, PRIOR)
    dense = torch.from_numpy(truth.toarray())
    for length in (0, 1, 3, 7):
        found = np.zeros(scores.shape, np.uint8)
        columns = ranked.columns[:, :length] if length else np.tile(PRIOR, (50, 1))
        np.put_along_axis(found, columns, 1, axis=1)
        assert np.abs(table[:, length] - F2.stats(torch.from_numpy(found), dense).numpy()).max() < 1e-12


@pytest.mark.parametrize("trim", [1, 2])
def test_cluster_trim_equals_the_slow_loop(trim):
    scores, _ = scores_and_truth(60)
    clusters = np.random.default_rng(1).integers(0, 6, 30)
    kept = Ranked.of(scores).trimmed(clusters, trim)
    for row in range(60):
        wanted, room = [], dict.fromkeys(range(6), trim)
        for column in np.argsort(-scores[row], kind="stable"):
            if room[clusters[column]]:
                room[clusters[column]] -= 1
                wanted.append(column)
        found = [c for c, score in zip(kept.columns[row], kept.scores[row], strict=True) if score >= 0]
        assert found == wanted
    decided = decision.apply(
        torch.from_numpy(scores), {"rule": vars(Rule("threshold", 0.0, 0, 30, trim))}, Rule(), PRIOR, clusters
    )["labels"].numpy()
    assert max(np.bincount(clusters[row > 0]).max() for row in decided) == trim


def test_no_row_is_ever_empty():
    scores = torch.zeros(3, 30)
    scores[1, 7] = 0.9
    found = decision.apply(scores, {"rule": vars(Rule("threshold", 0.5, 0, 5))}, Rule(), PRIOR, ALONE)
    assert [np.flatnonzero(row).tolist() for row in found["labels"].numpy()] == [[2, 4], [7], [2, 4]]
    assert found["best"][1, 0] == 7 and found["best"].shape == (3, 5)


def test_what_is_tuned_beats_the_default_and_says_what_it_is_worth():
    scores, truth = scores_and_truth(800)
    skewed = scores**3  # over-cautious scores, as after a focal loss
    found = decision.tune(skewed, truth, PRIOR, ALONE, (0,), Rule("threshold", 0.5), seed=0)
    dense = torch.from_numpy(truth.toarray())

    def mean(tuned: dict) -> float:
        labels = decision.apply(torch.from_numpy(skewed), tuned, Rule("threshold", 0.5), PRIOR, ALONE)["labels"]
        return F2.score(labels, dense)

    assert mean(found) > mean({}) + 0.1
    assert mean(found) - 0.05 < found["score"] <= mean(found) + 1e-9
    assert found == decision.tune(skewed, truth, PRIOR, ALONE, (0,), Rule("threshold", 0.5), seed=0)


def test_the_default_stays_where_nothing_is_surely_better():
    """The probabilities are calibrated, so on few images the best of hundreds of rules is best by luck only."""
    tuned = []
    for seed in range(12):
        scores, truth = scores_and_truth(120, seed=seed)
        tuned.append(decision.tune(scores, truth, PRIOR, ALONE, (0,), Rule(), seed=0)["rule"])
    assert sum(rule == asdict(Rule()) for rule in tuned) >= 6


def test_against_negatives_equals_the_loop():
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    found = decision.against_negatives(logits)
    for row in range(4):
        rest = logits[row].sort(descending=True).values[10:].exp().sum()
        for label in range(20):
            wanted = logits[row, label].exp() / (logits[row, label].exp() + rest)
            assert float(found[row, label]) == pytest.approx(float(wanted), rel=1e-5)


def test_clusters_join_labels_that_come_together():
    rng = np.random.default_rng(0)
    dense = np.zeros((600, 13), np.uint8)
    for row in range(600):
        dense[row, rng.integers(3) * 4 + rng.choice(4, 2, replace=False)] = 1
    embedding = LabelEmbedding.fit(csr_matrix(dense), 6)
    clusters = decision.cluster(embedding, 3)
    assert [len(set(clusters[start : start + 4])) for start in (0, 4, 8)] == [1, 1, 1]
    assert len(set(clusters)) == 4 and clusters[12] >= 13, "a label without images is a cluster of its own"


def test_the_score_of_a_rule_is_not_of_the_images_that_it_was_chosen_on():
    """With random scores the best of a thousand rules does too well on its own images: the reported score is lower."""
    optimism = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        scores, truth = rng.random((25, 30), np.float32), csr_matrix((rng.random((25, 30)) < 0.1).astype(np.uint8))
        found = decision.tune(scores, truth, PRIOR, ALONE, (0,), Rule("threshold", 2.0), seed=0)
        labels = decision.apply(torch.from_numpy(scores), found, Rule(), PRIOR, ALONE)["labels"]
        optimism.append(F2.score(labels, truth.toarray()) - found["score"])
    assert np.mean(optimism) > 0.01, optimism


@pytest.mark.parametrize("count", [1, 2])
def test_one_image_is_scored_by_the_default_and_two_by_the_rules_of_each_other(count):
    scores, truth = np.eye(30, dtype=np.float32)[[3, 4]][:count], csr_matrix(np.eye(30, dtype=np.uint8)[[3, 9]][:count])
    default = Rule("threshold", 2.0)  # no score reaches 2, so it predicts the prior's labels
    found = decision.tune(scores, truth, PRIOR, ALONE, (0,), default, seed=0)["score"]
    alone = [
        decision.tune(scores[[row]], truth[row], PRIOR, ALONE, (0,), default, seed=0)["rule"]
        for row in reversed(range(count))
    ]
    rules = [{"rule": rule} for rule in alone] if count > 1 else [{}]
    labels = [
        decision.apply(torch.from_numpy(scores[[row]]), rule, default, PRIOR, ALONE)["labels"]
        for row, rule in enumerate(rules)
    ]
    assert found == pytest.approx(F2.score(torch.cat(labels), truth.toarray()))
