"""Metrics and their standard errors against scikit-learn, scipy and slow loops: at once, in batches, on two ranks."""

import math
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn import metrics as sk

from common import metrics
from common.engine.ranks import Ranks
from common.errors import UserError
from common.metrics import Metric, Scores, check_direction, evaluate

RNG = np.random.default_rng(0)
N, L = 211, 4
P = RNG.random((N, L)).round(2)  # ties
Y = ((RNG.random((N, L)) + P) > 1.1).astype(np.int64)
W = RNG.random(N) + 0.1
SOFTMAX = np.exp(3 * P) / np.exp(3 * P).sum(1, keepdims=True)
CLASS = SOFTMAX.cumsum(1).__gt__(RNG.random((N, 1))).argmax(1)
REAL, GUESS = RNG.gamma(2, size=(N, 3)), RNG.gamma(2, size=(N, 3))
RATING, RATED = RNG.integers(0, 5, N), RNG.integers(0, 5, N)
RATED[:100] = RATING[:100]
ONE, SAID = Y[:, 0], (P[:, 0] > 0.5).astype(np.int64)


def weighted(metric: Metric) -> Metric:
    return metric.on(lambda d, t: (d, t["y"], t["w"]))


def columns(of, truth=Y, **options):
    return np.mean([of(truth[:, label], P[:, label], **options) for label in range(truth.shape[1])])


def clipped(p):
    return np.clip(p, 1e-15, 1 - 1e-15)


def f(average, beta, truth, found, **options):
    return sk.fbeta_score(truth, found, beta=beta, average=average, zero_division=0, **options)


F2 = [metrics.f_beta(2, average, threshold=0.5) for average in ("micro", "macro", "samples")]
HOT = np.eye(L, dtype=int)[CLASS]
CASES = {  # metric, decisions, targets, score, or a function of the weights to score
    "accuracy": (metrics.accuracy(), RATED, RATING, lambda w: sk.accuracy_score(RATING, RATED, sample_weight=w)),
    "accuracy of classes": (metrics.accuracy(), SOFTMAX, CLASS, sk.accuracy_score(CLASS, SOFTMAX.argmax(1))),
    "accuracy of entries": (metrics.accuracy(0.5), P, Y, ((P > 0.5) == Y).mean()),
    "f2 micro": (F2[0], P, Y, lambda w: f("micro", 2, Y, P > 0.5, sample_weight=w)),
    "f2 macro": (F2[1], P, Y, lambda w: f("macro", 2, Y, P > 0.5, sample_weight=w)),
    "f2 samples": (F2[2], P, Y, lambda w: f("samples", 2, Y, P > 0.5, sample_weight=w)),
    "f1 binary": (metrics.f_beta(1, "micro"), SAID, ONE, lambda w: sk.f1_score(ONE, SAID, sample_weight=w)),
    "f1 of classes": (
        metrics.f_beta(1, "macro", classes=7),
        SOFTMAX,
        CLASS,
        f("macro", 1, CLASS, SOFTMAX.argmax(1), labels=range(7)),
    ),
    "log loss": (metrics.log_loss(), P[:, 0], ONE, lambda w: sk.log_loss(ONE, clipped(P[:, 0]), sample_weight=w)),
    "log loss of classes": (
        metrics.log_loss(),
        7 * SOFTMAX / 8,
        CLASS,
        lambda w: sk.log_loss(CLASS, SOFTMAX, sample_weight=w),
    ),
    "log loss of labels": (metrics.log_loss(), P, Y, columns(lambda y, p: sk.log_loss(y, clipped(p)))),
    "mae": (metrics.mae(), GUESS, REAL, lambda w: sk.mean_absolute_error(REAL, GUESS, sample_weight=w)),
    "rmse": (metrics.rmse(), GUESS, REAL, lambda w: sk.mean_squared_error(REAL, GUESS, sample_weight=w) ** 0.5),
    "rmse, one": (metrics.rmse(), GUESS[:, 0], REAL[:, 0], sk.root_mean_squared_error(REAL[:, 0], GUESS[:, 0])),
    "mcrmse, one": (metrics.rmse(True), GUESS[:, 0], REAL[:, 0], sk.root_mean_squared_error(REAL[:, 0], GUESS[:, 0])),
    "mcrmse": (metrics.rmse(True), GUESS, REAL, lambda w: sk.root_mean_squared_error(REAL, GUESS, sample_weight=w)),
    "rmsle": (
        metrics.rmsle(),
        GUESS[:, 0],
        REAL[:, 0],
        lambda w: sk.root_mean_squared_log_error(REAL[:, 0], GUESS[:, 0], sample_weight=w),
    ),
    "kappa": (
        metrics.quadratic_kappa(),
        RATED,
        RATING,
        lambda w: sk.cohen_kappa_score(RATED, RATING, weights="quadratic", sample_weight=w),
    ),
    "auc": (metrics.roc_auc(), P[:, 0], ONE, lambda w: sk.roc_auc_score(ONE, P[:, 0], sample_weight=w)),
    "auc macro": (metrics.roc_auc(), P, Y, lambda w: sk.roc_auc_score(Y, P, sample_weight=w)),
    "auc micro": (metrics.roc_auc("micro"), P, Y, lambda w: sk.roc_auc_score(Y, P, average="micro", sample_weight=w)),
    "auc of classes": (metrics.roc_auc(), SOFTMAX, CLASS, sk.roc_auc_score(CLASS, SOFTMAX, multi_class="ovr")),
    "ap": (metrics.average_precision(), P, Y, lambda w: sk.average_precision_score(Y, P, sample_weight=w)),
    "ap micro": (
        metrics.average_precision("micro"),
        P,
        Y,
        lambda w: sk.average_precision_score(Y, P, average="micro", sample_weight=w),
    ),
    "spearman": (metrics.spearman(), P[:, 0], REAL[:, 0], spearmanr(P[:, 0], REAL[:, 0]).statistic),
    "spearman of columns": (
        metrics.spearman(),
        GUESS.round(1),
        REAL,
        np.mean([spearmanr(GUESS.round(1)[:, c], REAL[:, c]).statistic for c in range(3)]),
    ),
}


def batches(decisions, targets, size=50):
    return [
        (decisions[start : start + size], targets[start : start + size]) for start in range(0, len(decisions), size)
    ]


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_the_references(case):
    metric, decisions, targets, expected = CASES[case]
    plain = expected(None) if callable(expected) else expected
    assert metric.score(decisions, targets) == pytest.approx(plain, rel=1e-12)
    assert evaluate((metric,), batches(decisions, targets))[metric.name] == pytest.approx(plain, rel=1e-12)
    gaps = [(decisions[:0], targets[:0]), (decisions, targets), (decisions[:0], targets[:0])]
    assert evaluate((metric,), gaps)[metric.name] == metric.score(decisions, targets)
    if callable(expected):
        found = weighted(metric).score(decisions, {"y": targets, "w": W})
        assert found == pytest.approx(expected(W), rel=1e-11)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64])
def test_unsigned_class_numbers_score_as_any_others(dtype):
    """torch has no arithmetic for them; masks of 16 bits are read so."""
    rated, rating, said, one = (x.astype(dtype) for x in (RATED, RATING, SAID, ONE))
    assert metrics.accuracy().score(rated, rating) == metrics.accuracy().score(RATED, RATING)
    assert metrics.quadratic_kappa().score(rated, rating) == metrics.quadratic_kappa().score(RATED, RATING)
    assert metrics.map_at_k(1).score(rated, rating) == metrics.map_at_k(1).score(RATED, RATING)
    assert metrics.f_beta(1, "micro").score(said, one) == metrics.f_beta(1, "micro").score(SAID, ONE)
    assert metrics.dice().score(Y.astype(dtype)[:, None], Y[:, None]) == 1


def test_columns_of_pandas_are_scored_in_their_order():
    table = pd.DataFrame({"p": P[:, 0], "y": ONE}, index=np.arange(N)[::-1])
    assert metrics.roc_auc().score(table["p"], table["y"]) == metrics.roc_auc().score(P[:, 0], ONE)
    assert metrics.rmse().score(table[["p"]], table["p"]) == 0


@pytest.mark.parametrize("case", CASES)
def test_sizes_of_one_are_dropped_and_other_shapes_refused(case):
    metric, decisions, targets, _ = CASES[case]
    expected = metric.score(decisions, targets)
    if decisions.ndim == 1:
        assert metric.score(decisions[:, None], targets) == expected
        assert metric.score(decisions, targets[:, None]) == expected
    with pytest.raises(UserError, match="do not fit targets"):
        metric.score(decisions, np.ones((N, L + 1), targets.dtype))
    with pytest.raises(UserError, match="a batch has 200 and 211 rows"):
        metric.score(decisions, targets[:200])


def test_statistics_that_broadcast_are_refused():
    """Shapes inside a tree cannot be compared, so the statistics of a single row show whether a metric broadcasts."""
    squares = Metric("squares", lambda d, t: (d["a"] - t["a"]) ** 2, lambda sums, count: float(sums.mean()) / count)
    column = torch.zeros(5, 1)
    assert squares.score({"a": column}, {"a": column + 2}) == 4
    with pytest.raises(UserError, match=r"5 rows have statistics \(5, 5\), but one row has \(1, 1\): .* broadcast"):
        squares.score({"a": column}, {"a": column[:, 0]})
    with pytest.raises(UserError, match=r"statistics \(\) for 5 rows|for 5 rows: return"):
        Metric("one", lambda d, t: d.mean(0)).score(column, column)
    with pytest.raises(UserError, match="either stats"):
        Metric("none")


def apk(truth, ranked, k):
    """Ben Hamner's definition, which Kaggle uses."""
    score, hits = 0.0, 0
    for place, label in enumerate(ranked[:k]):
        if label in truth and label not in ranked[:place]:
            hits += 1
            score += hits / (place + 1)
    return score / min(len(truth), k) if truth else 0.0


def test_map_at_k_is_kaggles():
    ranked = RNG.integers(-1, 6, (N, 5))  # repeats and gaps
    truth = RNG.random((N, 6)) < 0.3
    for k in (1, 3, 5, 12):
        metric = metrics.map_at_k(k)
        sets = [set(np.flatnonzero(row)) for row in truth]
        expected = [apk(labels, row.tolist(), k) for labels, row in zip(sets, ranked, strict=True)]
        assert metric.score(ranked, truth) == pytest.approx(np.mean(expected))
        single = [apk({label}, row.tolist(), k) for label, row in zip(CLASS.tolist(), ranked, strict=True)]
        assert metric.score(ranked, CLASS) == pytest.approx(np.mean(single))
    assert metrics.map_at_k(1).score(ranked[:, :1], CLASS) == (ranked[:, 0] == CLASS).mean()
    assert metrics.map_at_k(5).score(ranked, np.full(N, -1)) == 0, "no class is not a class that can be hit"
    order = np.argsort(-P, axis=1, kind="stable")
    assert metrics.map_at_k(3).score(P, CLASS) == metrics.map_at_k(3).score(order, CLASS)


def test_dice_of_images_and_of_the_set():
    found, truth = RNG.random((9, 2, 5, 7)) > 0.7, RNG.random((9, 2, 5, 7)) > 0.6
    found[0], truth[0], truth[1, 0] = False, False, False
    both, total = (found & truth).sum((2, 3)), found.sum((2, 3)) + truth.sum((2, 3))
    each = np.where(total > 0, 2 * both / np.maximum(total, 1), 1)
    assert metrics.dice().score(found, truth) == pytest.approx(each.mean())
    assert metrics.dice(empty=0.0).score(found, truth) == pytest.approx((each.sum() - 2) / 18)
    assert metrics.dice("set").score(found, truth) == pytest.approx((2 * both.sum(0) / total.sum(0)).mean())
    flat = sk.f1_score(truth[:, 0].ravel(), found[:, 0].ravel())
    assert metrics.dice("set").score(found[:, :1], truth[:, 0]) == pytest.approx(flat)
    with pytest.raises(UserError, match="decide in Postprocess's `apply`"):
        metrics.dice().score(found * 0.4, truth)


def test_unknown_targets_do_not_count_and_unknown_decisions_spoil_the_score():
    unknown = RNG.random((N, 3)) < 0.3
    real = np.where(unknown, np.nan, REAL)
    known = ~unknown
    errors = np.abs(GUESS - REAL)
    assert metrics.mae().score(GUESS, real) == pytest.approx(errors[known].mean())
    each = [np.sqrt((errors[known[:, c], c] ** 2).mean()) for c in range(3)]
    assert metrics.rmse(True).score(GUESS, real) == pytest.approx(np.mean(each))
    labels = np.where(unknown, np.nan, Y[:, :3])
    each = [sk.roc_auc_score(Y[known[:, c], c], P[known[:, c], c]) for c in range(3)]
    assert metrics.roc_auc().score(P[:, :3], labels) == pytest.approx(np.mean(each))
    expected = sk.f1_score(Y[:, :3][known], P[:, :3][known] > 0.5)
    assert metrics.f_beta(1, "micro", threshold=0.5).score(P[:, :3], labels) == pytest.approx(expected)
    classes = np.where(unknown[:, 0], np.nan, RATING)
    expected = sk.f1_score(RATING[known[:, 0]], RATED[known[:, 0]], average="macro")
    assert metrics.f_beta(1, "macro", classes=RATING.max() + 1).score(RATED, classes) == pytest.approx(expected)
    expected = sk.cohen_kappa_score(RATED[known[:, 0]], RATING[known[:, 0]], weights="quadratic")
    assert metrics.quadratic_kappa().score(RATED, np.where(unknown[:, 0], np.nan, RATING)) == pytest.approx(expected)
    for metric, decisions, targets, _ in CASES.values():
        if decisions.dtype.kind == "f":
            spoilt = decisions.copy()
            spoilt[7] = np.nan
            assert math.isnan(metric.score(spoilt, targets)), metric.name


def test_what_has_no_score_is_nan():
    ones = np.ones(5, int)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(metrics.roc_auc().score(P[:5, 0], ones))
        assert math.isnan(metrics.average_precision().score(P[:5, 0], 0 * ones))
        assert math.isnan(metrics.spearman().score(P[:5, 0], ones))
        assert math.isnan(metrics.quadratic_kappa().score(ones, ones))
    truth = np.column_stack([ones, ONE[:5]])
    assert math.isnan(metrics.roc_auc().score(P[:5, :2], truth))
    assert metrics.roc_auc(one_class="skip").score(P[:5, :2], truth) == metrics.roc_auc().score(P[:5, 1], truth[:, 1])


@pytest.mark.parametrize("of", [metrics.roc_auc, metrics.average_precision])
def test_infinite_scores_are_ties_like_others(of):
    """The logarithm of a probability of 0 is one."""
    tied = np.array([-np.inf, -np.inf, 0.5, 0.7, np.inf, np.inf])
    for truth in ([1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert of().score(tied, np.array(truth)) == of().score(np.array([0, 0, 1, 2, 3, 3.0]), np.array(truth))


@pytest.mark.parametrize("of", [metrics.roc_auc, metrics.average_precision])
def test_a_column_of_which_nobody_knows_a_target_has_no_score(of):
    """A standard error leaves out groups of rows, and one of them may hold all known targets of a rare column."""
    truth = np.full((N, 2), np.nan)
    truth[:, 0], truth[7, 1] = ONE, 1
    scores = Scores((of(one_class="skip"),), with_errors=True)
    scores.add(P[:, :2], truth)
    assert all(map(math.isfinite, scores.found()[of().name]))
    truth[7, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert of(one_class="skip").score(P[:, :2], truth) == pytest.approx(of().score(P[:, 0], ONE))
        assert math.isnan(of().score(P[:, :2], truth)) and math.isnan(metrics.spearman().score(P[:, :2], truth))


def test_what_a_metric_cannot_compare_is_refused():
    for metric, decisions, message in (
        (metrics.accuracy(), P[:, 0], "needs decisions, found scores"),
        (metrics.log_loss(), P[:, 0] * 3, "needs probabilities, found 0"),
        (metrics.quadratic_kappa(), P[:, 0], "round the decisions"),
        (metrics.rmsle(), P[:, 0] - 1.5, "clip at 0"),
        (metrics.map_at_k(3), P[:, 0], "map_at_3: decisions"),
    ):
        with pytest.raises(UserError, match=message):
            metric.score(decisions, ONE)
    with pytest.raises(UserError, match="not one of the held-out images"):
        evaluate((metrics.accuracy(),), [])


class Together(Ranks):
    """Ranks that are threads. Real ranks are processes and have tests of their own."""

    def exchanged(self, value):
        self.box[self.rank] = value
        self.meeting.wait()
        found = list(self.box)
        self.meeting.wait()
        return found

    def sum_(self, tensor):
        return tensor.copy_(sum(x.clone() for x in self.exchanged(tensor.clone())))

    def union(self, entries):
        return {key: value for part in self.exchanged(entries) for key, value in part.items()}

    def gather(self, tree):
        parts = [part for part in self.exchanged(tree) if part is not None]
        return tuple(torch.cat(leaves) for leaves in zip(*parts, strict=True)), 0


@pytest.mark.parametrize("cut", [0, 130, N])
def test_ranks_with_unequal_shares_score_what_one_process_does(cut):
    both = (metrics.rmse(), metrics.roc_auc(), metrics.accuracy(0.5))
    whole = evaluate(both, [(P[:, 0], ONE)])
    Together.box, Together.meeting = [None, None], threading.Barrier(2, timeout=20)
    found = {}

    def rank(number, rows):
        found[number] = evaluate(both, batches(P[rows, 0], ONE[rows]), Together(number, 2))

    threads = [threading.Thread(target=rank, args=(n, part)) for n, part in enumerate((np.s_[:cut], np.s_[cut:]))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == pytest.approx(whole, rel=1e-14)


def test_direction_must_be_that_of_the_competition():
    check_direction(metrics.rmse(), False)
    with pytest.raises(UserError, match="SOURCE.higher_is_better is True, that of the metric rmse is False"):
        check_direction(metrics.rmse(), True)


def with_error(metric, pairs, seed=0):
    """(score, standard error)"""
    scores = Scores((metric,), with_errors=True, seed=seed)
    for pair in pairs:
        scores.add(*pair)
    return scores.found()[metric.name]


def test_standard_error_of_a_mean_is_exact():
    hits = (RATED == RATING).astype(float)
    exact = hits.std(ddof=1) / math.sqrt(N)
    assert with_error(metrics.accuracy(), [(RATED, RATING)])[1] == pytest.approx(exact)
    score, error = with_error(metrics.accuracy(), batches(RATED, RATING))
    assert score == metrics.accuracy().score(RATED, RATING) and error == pytest.approx(exact)


@pytest.mark.parametrize("metric", [metrics.rmse(), metrics.roc_auc(), metrics.f_beta(1, "micro", threshold=0.5)])
def test_standard_error_is_the_spread_over_other_samples(metric):
    """Against the scores of 500 fresh sets of rows."""
    random = np.random.default_rng(1)

    def draw(rows=400):
        truth = random.integers(0, 2, rows)
        return truth * 0.5 + random.normal(0.3, 0.5, rows), truth

    spread = np.std([metric.score(*draw()) for _ in range(500)])
    errors = [with_error(metric, [draw()], seed)[1] for seed in range(20)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.12)
    assert np.std(errors) / np.mean(errors) < 0.2
    decisions, targets = draw()
    whole = with_error(metric, [(decisions, targets)])
    assert with_error(metric, batches(decisions, targets, 37)) == pytest.approx(whole, rel=1e-12)


def test_kappa_of_one_column_and_of_several():
    """A table's network has outputs [B, 1], and its targets are [n, 1]."""
    decisions, targets = torch.tensor([0, 1, 2, 2]), torch.tensor([0, 2, 2, 1])
    wanted = metrics.quadratic_kappa().score(decisions, targets)
    assert metrics.quadratic_kappa().score(decisions[:, None], targets[:, None]) == wanted
    with pytest.raises(UserError, match="one rating"):
        metrics.quadratic_kappa().score(decisions.view(2, 2), targets.view(2, 2))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_log_loss_names_class_numbers_out_of_range(wrong):
    """It was torch's "index 3 is out of bounds"; on a card it would end in an assert of the device."""
    with pytest.raises(
        UserError, match=f"class numbers from .*{wrong}.* for predictions of 3 classes, expected 0 to 2"
    ):
        metrics.evaluate([metrics.log_loss()], [(torch.full((3, 3), 1 / 3), torch.tensor([0, 2, wrong]))])
