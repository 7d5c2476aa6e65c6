"""Blends of runs: weights are chosen on out-of-fold predictions, and scored on rows that had no part in the choice.

    members  [runs, m, ...]   out-of-fold predictions of every run for the same m rows, as the runs keep them
    parts    [m]              the fold of every row: each part is scored with weights chosen on the other parts
    objective(predictions [n, ...], rows [n]) -> float, larger is better: `maximise` makes one from a metric
    choose(members [runs, n, ...], rows [n]) -> fitted, and fitted(members [runs, k, ...]) -> predictions [k, ...]

    blend = nested(members, parts, hill_climbing(objective), objective)
    test = blend.fitted(test_members)

The ways to choose: `equal`, `hill_climbing`, `optimum`, `least_squares`, `per_class` of one of these, and `stacked`.
Where predictions are a dict, or too large to hold those of several runs in memory, choose on one leaf or on some rows,
and let `fitted` combine the rest block by block. Means are taken in a space: PLAIN, RANKS, or power(p); p=0 is
geometric.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from common.batch import Tree, map_tree
from common.errors import UserError, first_line
from common.loading.collate import as_tensors
from common.metrics import Metric

Objective = Callable[[np.ndarray, np.ndarray], float]
Fitted = Callable[[np.ndarray], np.ndarray]
Choose = Callable[[np.ndarray, np.ndarray], Fitted]
SMALLEST = 1e-15  # lower bound of predictions in logarithms and negative powers
CORRELATED = 1_000_000  # about as many numbers of each run go into the correlations


@dataclass(frozen=True)
class Space:
    """The space in which means are taken: `there` maps members [runs, n, ...] to it, `back` a mean [n, ...] from it."""

    there: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _ranks(members: np.ndarray) -> np.ndarray:
    """Average ranks from 0 to 1 among the rows, every run and column on its own."""
    from scipy.stats import rankdata

    return (rankdata(members, axis=1) / members.shape[1]).astype(np.float32)


PLAIN = Space(_same, _same)
RANKS = Space(_ranks, _same)  # for metrics of the order alone; ranks are among the rows predicted together


def power(exponent: float) -> Space:
    """The power mean: 1 is the plain mean, 0 geometric, -1 harmonic. Raises UserError for negative predictions."""

    def there(members: np.ndarray) -> np.ndarray:
        if members.min() < 0:
            raise UserError(
                f"power:{exponent:g} needs predictions of 0 or more, found {members.min():.5g}: use --space plain"
            )
        if exponent <= 0:
            members = np.maximum(members, SMALLEST)
        return members**exponent if exponent else np.log(members)

    return Space(there, lambda x: x ** (1 / exponent) if exponent else np.exp(x))


@dataclass(frozen=True)
class Weighted:
    """The weighted mean in a space; `weights` [runs] sum to 1."""

    weights: np.ndarray
    space: Space = PLAIN

    def __call__(self, members: np.ndarray) -> np.ndarray:
        return self.space.back(_mean(self.space.there(members), self.weights))


@dataclass(frozen=True)
class ByClass:
    """Combines every class (the axis after the rows) with its own weights."""

    fitted: tuple[Weighted, ...]

    @property
    def weights(self) -> np.ndarray:
        """[runs, C]"""
        return np.stack([one.weights for one in self.fitted], axis=1)

    def __call__(self, members: np.ndarray) -> np.ndarray:
        return np.stack([one(members[:, :, label]) for label, one in enumerate(self.fitted)], axis=1)


def _mean(members: np.ndarray, weights: np.ndarray) -> np.ndarray:
    total = np.zeros(members.shape[1:], members.dtype)
    for member, weight in zip(members, weights.tolist(), strict=True):
        if weight:
            total += weight * member
    return total


def maximise(metric: Metric, targets: Tree, decide: Callable[[np.ndarray], Any] = _same) -> Objective:
    """An objective from a metric of decide(predictions) against `targets`, a tree of arrays or tensors [m, ...].

    Its sign is changed where lower is better. An undefined score (NaN) counts as the worst.
    """

    targets = as_tensors(targets)

    def objective(predictions: np.ndarray, rows: np.ndarray) -> float:
        score = metric.sign * metric.score(decide(predictions), map_tree(lambda x: x[rows], targets))
        return -math.inf if math.isnan(score) else score

    return objective


def equal(space: Space = PLAIN) -> Choose:
    """Equal weights in a space: nothing is chosen."""
    return lambda members, rows: Weighted(np.full(len(members), 1 / len(members)), space)


def hill_climbing(objective: Objective, space: Space = PLAIN, rounds: int = 50, patience: int = 5) -> Choose:
    """Ensemble selection with replacement (Caruana and others, ICML 2004).

    Every round adds to the mean the run with which it scores best; a run may be added several times. The best of these
    means is kept. Stops after `rounds`, or after `patience` rounds without improvement.
    """

    def choose(members: np.ndarray, rows: np.ndarray) -> Weighted:
        members = space.there(members)
        total, counts = np.zeros_like(members[0]), np.zeros(len(members))
        best, kept, since = -math.inf, None, 0
        for size in range(1, rounds + 1):
            scores = [objective(space.back((total + member) / size), rows) for member in members]
            chosen = int(np.argmax(scores))
            total += members[chosen]
            counts[chosen] += 1
            since += 1
            if kept is None or scores[chosen] > best:
                best, kept, since = scores[chosen], counts.copy(), 0
            if since == patience:
                break
        return Weighted(kept / kept.sum(), space)

    return choose


def optimum(objective: Objective, space: Space = PLAIN, calls: int = 30) -> Choose:
    """The weights with the best objective, by Nelder-Mead search from equal weights; `calls` evaluations for every run.

    It needs an objective without steps: for accuracy, hill climbing finds better weights.
    """

    def choose(members: np.ndarray, rows: np.ndarray) -> Weighted:
        from scipy.optimize import minimize
        from scipy.special import softmax

        if len(members) == 1:
            return Weighted(np.ones(1), space)
        members = space.there(members)

        def weights_of(free: np.ndarray) -> np.ndarray:
            return softmax(np.append(free, 0.0))

        def loss(free: np.ndarray) -> float:
            return -objective(space.back(_mean(members, weights_of(free))), rows)

        start = np.zeros(len(members) - 1)
        simplex = np.vstack([start, np.eye(len(start))])
        options = {"initial_simplex": simplex, "maxfev": calls * len(members), "xatol": 0.01, "fatol": math.inf}
        return Weighted(weights_of(minimize(loss, start, method="Nelder-Mead", options=options).x), space)

    return choose


def least_squares(targets: np.ndarray) -> Choose:
    """Non-negative least-squares weights, scaled to sum 1; equal weights where all targets are 0.

    `targets` [m, ...] have the shape of one run's predictions, or are class numbers [m] of predictions [m, C].
    """

    def choose(members: np.ndarray, rows: np.ndarray) -> Weighted:
        from scipy.optimize import nnls

        truth = np.asarray(targets)[rows]
        if members.ndim == truth.ndim + 2:
            truth = truth[:, None] == np.arange(members.shape[2])
        if members.shape[1:] != truth.shape:
            raise UserError(f"least squares: predictions {members.shape[1:]} do not fit targets {truth.shape}")
        flat, wanted = members.reshape(len(members), -1).astype(np.float64), truth.reshape(-1).astype(np.float64)
        known = ~np.isnan(wanted)
        if not wanted[known].any():  # a label that none of these rows has
            return equal()(members, rows)
        orthogonal, triangle = np.linalg.qr(flat[:, known].T)
        weights, _ = nnls(triangle, orthogonal.T @ wanted[known])
        if not weights.any():
            raise UserError(
                "least squares: no run gets a positive weight, as they predict the opposite: leave them out"
            )
        return Weighted(weights / weights.sum())

    return choose


def per_class(choose_of: Callable[[int], Choose]) -> Choose:
    """Choose for every class (the axis after the rows) on its own: choose_of(c) gets its members [runs, n, ...]."""

    def choose(members: np.ndarray, rows: np.ndarray) -> ByClass:
        return ByClass(tuple(choose_of(c)(members[:, :, c], rows) for c in range(members.shape[2])))

    return choose


def stacked(model: Any, targets: np.ndarray) -> Choose:
    """A scikit-learn model on the predictions of all runs side by side: Ridge(), or LogisticRegression() for classes.

    It is fitted to `targets` [m] or [m, T]. A class that is absent from the rows of a fit gets the probability 0.
    """

    def features(members: np.ndarray) -> np.ndarray:
        return np.moveaxis(members, 0, 1).reshape(members.shape[1], -1)

    def choose(members: np.ndarray, rows: np.ndarray) -> Fitted:
        from sklearn.base import clone

        try:
            fitted = clone(model).fit(features(members), np.asarray(targets)[rows])
        except ValueError as error:  # one class alone, or targets that nobody knows
            reason = first_line(error)
            raise UserError(f"a stack cannot be fitted to these targets ({reason}): use another --by") from error
        if not hasattr(fitted, "predict_proba"):
            return lambda others: fitted.predict(features(others)).reshape(others.shape[1:])

        classes = fitted.classes_.astype(int)
        if not 0 <= classes[0] <= classes[-1] < members.shape[2]:
            raise UserError(
                f"a stack of {members.shape[2]} classes: found targets {classes[0]} to {classes[-1]}, use --by hill"
            )

        def chances(others: np.ndarray) -> np.ndarray:
            result = np.zeros(others.shape[1:], np.float32)
            result[:, classes] = fitted.predict_proba(features(others))
            return result

        return chances

    return choose


@dataclass(frozen=True)
class Blend:
    """A way to combine runs, and what it is worth; scores are those of the objective."""

    fitted: Fitted  # chosen on all rows: for the test rows
    by_part: dict[int, Fitted]  # chosen on the other parts: for the rows of a part
    predictions: np.ndarray  # [m, ...] by `by_part`: tune on these and score them
    score: float  # of `predictions`
    mean: float  # score of the plain mean of the runs
    members: np.ndarray  # [runs] score of each run alone
    without: np.ndarray | None  # [runs] score of the blend without each run, NaN where the blend needs the run
    correlation: np.ndarray  # [runs, runs] of the runs' predictions

    @property
    def weights(self) -> np.ndarray | None:
        """[runs], or [runs, C] by class; None for a stack."""
        return getattr(self.fitted, "weights", None)


def nested(
    members: np.ndarray, parts: np.ndarray, choose: Choose, objective: Objective, leave_out: bool = True
) -> Blend:
    """Choose how to combine `members` [runs, m, ...], and score each part with what was chosen on the other parts.

    Raises UserError for fewer than two runs or parts, or predictions that are not finite.
    """
    parts, rows = np.asarray(parts), np.arange(members.shape[1])
    if len(members) < 2:
        raise UserError("a blend needs two runs or more: name them with RUN=one,two")
    if len(np.unique(parts)) < 2:
        raise UserError(
            "a blend is scored on other folds than its weights are chosen on, and these runs hold out a single one: "
            "train them with --fold all, where the competition has folds"
        )
    if parts.shape != rows.shape or not np.isfinite(members).all():
        raise UserError(
            f"a blend of {members.shape} with folds of {parts.shape} rows: expected finite [runs, rows, ...]"
        )
    by_part, predictions = _by_parts(members, parts, choose)
    score = partial(objective, rows=rows)
    without = None
    if leave_out:
        rest = (np.delete(members, run, axis=0) for run in range(len(members)))
        without = np.array([_score_or_nan(others, parts, choose, score) for others in rest])
    flat = members.reshape(len(members), -1)
    return Blend(
        choose(members, rows),
        by_part,
        predictions,
        score(predictions),
        score(equal()(members, rows)(members)),
        np.array([score(member) for member in members]),
        without,
        np.corrcoef(flat[:, :: max(1, flat.shape[1] // CORRELATED)]),
    )


def _score_or_nan(
    members: np.ndarray, parts: np.ndarray, choose: Choose, score: Callable[[np.ndarray], float]
) -> float:
    """The nested score of these runs; NaN if they cannot be combined, as the blend may need the run left out."""
    try:
        return score(_by_parts(members, parts, choose)[1])
    except UserError:
        return math.nan


def _by_parts(members: np.ndarray, parts: np.ndarray, choose: Choose) -> tuple[dict[int, Fitted], np.ndarray]:
    """For every part, what is chosen on the other parts; and the predictions [m, ...] that this gives for its rows."""
    result = np.empty(members.shape[1:], np.result_type(members, np.float32))
    chosen = {}
    for part in np.unique(parts).tolist():
        held = parts == part
        chosen[part] = choose(members[:, ~held], np.flatnonzero(~held))
        result[held] = chosen[part](members[:, held])
    return chosen, result
