"""The metrics that Kaggle uses, exact over the whole set: the same code scores validation, out-of-fold and local rows.

There are two kinds. An additive metric is computed from sums of per-sample statistics, so only the sums are kept. A
whole-set metric (ROC AUC, Spearman) needs all rows at once: they are gathered over batches and processes.

Rules for all of them:
- Decisions [B, 1] match targets [B]: axes of size one are dropped where that makes the shapes equal. The metrics below
  raise UserError on any other difference, so nothing is broadcast silently.
- A NaN target is unknown and does not count, as in the losses. A NaN decision makes the score NaN. A score that is not
  defined (AUC of one class) is NaN.
- Class scores [B, C] may be compared with class numbers [B].
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from common.batch import Tree, concatenated, map_tree, tensors_of
from common.engine.ranks import SINGLE, Ranks
from common.errors import UserError
from common.loading.collate import as_tensors

GROUPS = 100  # jackknife groups of rows: they give the standard error to about 7 percent


def mean(sums: Tensor, count: float) -> float:
    """The mean of one number per sample; from sums [2] (of weighted numbers, of weights) the weighted mean."""
    return float(sums) / count if sums.ndim == 0 else _ratio(float(sums[0]), float(sums[1]))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _both(decisions: Tree, targets: Tree) -> tuple[Tree, ...]:
    return decisions, targets


@dataclass(frozen=True)
class Metric:
    """A score over a whole set. Exactly one of `stats` and `whole` is given; it is called with the values of `pick`.

    `stats(decisions, targets) -> [B, ...]` are each sample's additive statistics, `value(sums, count)` is the score,
    where sums (float64) has the shape of `stats` without B and count is the number of samples.
    `whole(decisions, targets) -> float` gets numpy arrays of all rows, so scikit-learn's functions can be used.
    `pick(decisions, targets)` selects from larger trees the (decisions, targets) to compare. For the metrics below that
    take weights, it may return weights [B] as a third value. `on` sets it.
    """

    name: str
    stats: Callable[..., Tensor] | None = None
    value: Callable[[Tensor, float], float] = mean
    higher_is_better: bool = True
    whole: Callable[..., float] | None = None
    pick: Callable[[Tree, Tree], tuple[Tree, ...]] = _both

    def __post_init__(self):
        if (self.stats is None) == (self.whole is None):
            raise UserError(f"metric {self.name}: give either stats (with value) or whole")

    @property
    def sign(self) -> int:
        """1 when higher is better, else -1: a higher sign * score is always better."""
        return 1 if self.higher_is_better else -1

    def on(self, pick: Callable[[Tree, Tree], tuple[Tree, ...]], name: str | None = None) -> "Metric":
        """The same metric on a part of the decisions and targets: roc_auc().on(lambda d, t: (d["p"], t["y"]))."""
        return replace(self, pick=pick, name=name or self.name)

    def score(self, decisions: Any, targets: Any) -> float:
        """The score of all rows at once; trees of tensors, of numpy arrays or of columns of pandas."""
        return evaluate((self,), [(decisions, targets)])[self.name]


def evaluate(metrics: Sequence[Metric], batches: Iterable[tuple[Any, Any]], ranks: Ranks = SINGLE) -> dict[str, float]:
    """Every metric over batches of (decisions, targets), trees of tensors or arrays [B, ...].

    Over all ranks, each of which brings its own rows (or none): sums are added up, rows are joined in the order of the
    ranks, and every rank returns the same scores. Raises UserError when no rank has a row.
    """
    scores = Scores(metrics)
    for decisions, targets in batches:
        scores.add(decisions, targets)
    return {name: score for name, (score, _) in scores.found(ranks).items()}


def check_direction(metric: Metric, higher_is_better: bool) -> None:
    """Raises UserError when the run's metric and the competition's SOURCE disagree on what is better."""
    if metric.higher_is_better != higher_is_better:
        raise UserError(
            f"SOURCE.higher_is_better is {higher_is_better}, that of the metric {metric.name} is "
            f"{metric.higher_is_better}: correct the one that is wrong"
        )


class Scores:
    """Every metric, accumulated batch by batch; `with_errors` adds its standard error, in a single process only.

    A mean has the usual standard error. For other scores it is a jackknife: rows fall at random (`seed`) into GROUPS
    groups, and each group is left out once. Rows are taken to be independent.
    """

    def __init__(self, metrics: Sequence[Metric], with_errors: bool = False, seed: int = 0):
        self.with_errors, self.random = with_errors, np.random.default_rng(seed)
        self.tallies = [(_Rows if metric.stats is None else _Sums)(metric) for metric in metrics]
        self.count = torch.zeros((), dtype=torch.float64)

    def add(self, decisions: Any, targets: Any) -> None:
        decisions = map_tree(_computable, as_tensors(decisions))
        first = tensors_of(decisions)[0]
        if not len(first):  # all images of the batch are unreadable
            return
        targets = map_tree(lambda x: _computable(x).to(first.device), as_tensors(targets))
        groups = None
        if self.with_errors:
            groups = torch.from_numpy((self.random.random(len(first)) * GROUPS).astype(np.int64))
        for tally in self.tallies:
            tally.add(_picked(tally.metric, decisions, targets), groups)
        self.count += len(first)

    def found(self, ranks: Ranks = SINGLE) -> dict[str, tuple[float, float]]:
        """{name: (score, standard error)} over all ranks; raises UserError when no rank has a row."""
        count = float(ranks.sum_(self.count))
        if not count:
            raise UserError(
                "not one of the held-out images can be read: make check, with the same COMP= and DATA=, lists them"
            )
        for tally in self.tallies:
            tally.join(ranks)
        return {
            tally.metric.name: (tally.score(count), tally.error(count) if self.with_errors else math.nan)
            for tally in self.tallies
        }


def _computable(tensor: Tensor) -> Tensor:
    """torch stores uint16, uint32 and uint64, as in masks of 16 bits, but neither compares nor multiplies them.

    Apple's GPUs have no float64, in which the sums are kept.
    """
    tensor = tensor.cpu() if tensor.device.type == "mps" else tensor
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64) else tensor


def _picked(metric: Metric, decisions: Tree, targets: Tree) -> tuple[Tree, ...]:
    """The values that the metric compares; axes of size one are dropped where the shapes differ in nothing else."""
    found, truth, *rest = metric.pick(decisions, targets)
    if isinstance(found, Tensor) and isinstance(truth, Tensor) and found.shape != truth.shape:
        plain, expected = (without_ones(tensor.shape) for tensor in (found, truth))
        if plain == expected:
            found, truth = found.reshape(plain), truth.reshape(expected)
    sizes = {len(tensor) for tensor in tensors_of((found, truth, *rest))}
    if len(sizes) > 1:
        raise UserError(
            f"metric {metric.name}: a batch has {' and '.join(map(str, sorted(sizes)))} rows of decisions and targets, "
            "expected equally many"
        )
    return found, truth, *rest


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape [B, ...] without its axes of size one: tensors that then have the same shape match."""
    return *shape[:1], *(size for size in shape[1:] if size != 1)


def _has_nan(tensor: Tensor) -> Tensor:
    return tensor.amin().isnan()  # far faster than isnan().any()


class _Sums:
    """The sums of an additive metric, over all rows and, for its error, over every group of rows."""

    def __init__(self, metric: Metric):
        self.metric = metric
        self.sums: Tensor | None = None
        self.spoilt: Tensor | int = 0  # how many decisions have a NaN

    def add(self, picked: tuple[Tree, ...], groups: Tensor | None) -> None:
        stats = self.metric.stats(*picked).detach()
        rows = len(tensors_of(picked)[0])
        if len(stats) != rows:
            raise UserError(
                f"metric {self.metric.name}: statistics {tuple(stats.shape)} for {rows} rows: return [B, ...]"
            )
        if self.sums is None:
            alone = self.metric.stats(*map_tree(lambda x: x[:1], picked)).shape[1:]
            if alone != stats.shape[1:]:
                raise UserError(
                    f"metric {self.metric.name}: {rows} rows have statistics {tuple(stats.shape)}, but one row has "
                    f"{(1, *alone)}: decisions and targets of different shapes were broadcast"
                )
            self.sums = torch.zeros(alone, dtype=torch.float64, device=stats.device)
            self.parts = torch.zeros(GROUPS, *alone, dtype=torch.float64)
            self.sizes, self.squares = torch.zeros(GROUPS, dtype=torch.float64), 0.0
        stats = stats.double()
        self.sums += stats.sum(0)
        self.spoilt = self.spoilt + sum(_has_nan(x).to(stats.device, torch.int64) for x in tensors_of(picked[0]))
        if groups is not None:
            stats = stats.cpu()
            self.parts.index_add_(0, groups, stats)
            self.sizes += groups.bincount(minlength=GROUPS)
            self.squares += float(stats.square().sum())

    def join(self, ranks: Ranks) -> None:
        shape = ranks.union({} if self.sums is None else {"sums": self.sums.shape})["sums"]
        sums = torch.zeros(shape, dtype=torch.float64) if self.sums is None else self.sums.cpu()  # no row here: zeros
        self.sums, self.spoilt = ranks.sum_(sums), ranks.sum_(torch.as_tensor(self.spoilt).cpu())

    def score(self, count: float) -> float:
        return math.nan if self.spoilt else float(self.metric.value(self.sums, count))

    def error(self, count: float) -> float:
        score = self.score(count)
        if self.metric.value is mean and self.sums.ndim == 0:
            return math.sqrt(max(self.squares / count - score**2, 0) / (count - 1)) if count > 1 else math.nan
        sizes = self.sizes.tolist()
        return _jackknife(score, lambda g: self.metric.value(self.sums - self.parts[g], count - sizes[g]), sizes, count)


class _Rows:
    """The rows of a whole-set metric, in main memory."""

    def __init__(self, metric: Metric):
        self.metric, self.rows, self.groups = metric, [], []

    def add(self, picked: tuple[Tree, ...], groups: Tensor | None) -> None:
        precise = map_tree(lambda x: x.float() if x.is_floating_point() and x.itemsize < 4 else x, picked)
        self.rows.append(map_tree(lambda x: x.detach().cpu(), precise))
        self.groups.append(groups)

    def join(self, ranks: Ranks) -> None:
        self.rows, _ = ranks.gather(concatenated(self.rows) if self.rows else None)

    def _of(self, chosen: Any) -> float:
        rows = map_tree(lambda x: x[chosen], self.rows)
        spoilt = any(map(_has_nan, tensors_of(rows[0])))
        return math.nan if spoilt else float(self.metric.whole(*map_tree(lambda x: x.numpy(), rows)))

    def score(self, count: float) -> float:
        return self._of(slice(None))

    def error(self, count: float) -> float:
        groups = torch.cat(self.groups).numpy()
        sizes = np.bincount(groups, minlength=GROUPS).tolist()
        return _jackknife(self.score(count), lambda g: self._of(torch.from_numpy(groups != g)), sizes, count)


def _jackknife(score: float, without: Callable[[int], float], sizes: list[float], count: float) -> float:
    """The standard error from the scores without each group, of `sizes` [GROUPS] rows."""
    if max(sizes) == count:  # nothing would be left
        return math.nan
    moved = [(without(group) - score) * (1 - size / count) for group, size in enumerate(sizes) if size]
    return math.sqrt(GROUPS / (GROUPS - 1) * math.fsum(move * move for move in moved))


# The library. `weights` [B] comes from `Metric.on`; shapes are those of decisions and targets.


def accuracy(threshold: float | None = None) -> Metric:
    """The correct fraction of class numbers [B] (or scores [B, C]), of a sample's entries, or of pixels.

    Scores in the shape of the targets need the `threshold` above which they mean 1.
    """

    def stats(decisions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if _of_classes(decisions, targets):
            decisions = decisions.argmax(1)
        _same_shape("accuracy", decisions, targets)
        found = _decided("accuracy", decisions, threshold)
        return _weighted((found == targets).float(), targets, weights)

    return Metric("accuracy", stats)


def f_beta(
    beta: float,
    average: Literal["micro", "macro", "samples"],
    classes: int | None = None,
    threshold: float | None = None,
    empty: float = 0.0,
) -> Metric:
    """F-beta of 0/1 labels [B, L] or [B]: of all entries together, the mean over labels, or the mean over samples.

    With `classes`, decisions and targets are class numbers [B] (or scores [B, C]). `empty` is the F of a label or
    sample without true and without predicted entries, or without known ones.
    """
    name = f"f{beta:g}_{average}"

    def counts(decisions: Tensor, targets: Tensor) -> Tensor:
        if classes is not None:
            decisions = decisions.argmax(1) if _of_classes(decisions, targets) else decisions
            _same_shape(name, decisions, targets)
            if targets.is_floating_point():
                decisions = decisions.where(~targets.isnan(), -1)
            decisions, targets = (
                x.long()[:, None] == torch.arange(classes, device=x.device) for x in (decisions, targets)
            )
        found, true = _binary(name, decisions, targets, threshold)
        every = torch.stack([found & true, found, true], -1).reshape(len(found), -1, 3).mT  # [B, 3, L]
        return every if average == "macro" else every.sum(2)

    return _f_of(name, counts, beta * beta, average == "samples", empty)


def dice(average: Literal["images", "set"] = "images", empty: float = 1.0, threshold: float | None = None) -> Metric:
    """Dice 2 |A and B| / (|A| + |B|) of masks [B, ..., H, W]: the mean over images and classes, or pooled over the set.

    `empty` is the Dice of two empty masks, and of an unknown mask. Pooled Dice is still averaged over classes.
    """

    def counts(decisions: Tensor, targets: Tensor) -> Tensor:
        found, true = (x.flatten(-2) for x in _binary("dice", decisions, targets, threshold))
        return torch.stack([(found & true).sum(-1), found.sum(-1), true.sum(-1)], 1)  # [B, 3, ...]

    return _f_of("dice", counts, 1.0, average == "images", empty)


def _f_of(name: str, counts: Callable[..., Tensor], square: float, of_samples: bool, empty: float) -> Metric:
    """F from `counts` [B, 3, ...] (hits, found, true) of every sample or their sums, averaged over the other axes."""

    def of(hits: Tensor, found: Tensor, true: Tensor) -> Tensor:
        total = square * true + found
        return torch.where(total > 0, (1 + square) * hits / total.clamp(min=1e-300), empty)

    def stats(decisions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        found = counts(decisions, targets)
        if of_samples:
            return _weighted(of(*found.double().unbind(1)), None, weights)
        return found if weights is None else found * _column(weights.double(), found)

    return Metric(name, stats, mean if of_samples else lambda sums, count: float(of(*sums).mean()))


def log_loss(eps: float = 1e-15) -> Metric:
    """Mean negative log-likelihood of the targets, in nats.

    Takes probabilities [B, C] for class numbers [B], scaled to sum 1; or [B, ...] for targets [B, ...] from 0 to 1,
    each entry on its own. They are clipped to eps and 1 - eps, as on Kaggle.
    """

    def stats(decisions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        least, most = map(float, decisions.aminmax())
        if least < 0 or most > 1:
            raise UserError(
                f"log_loss needs probabilities, found {least:.4g} to {most:.4g}: predict the softmax or sigmoid of the "
                "outputs"
            )
        if _of_classes(decisions, targets):
            classes, targets = decisions.shape[1], targets.long()
            if ((targets < 0) | (targets >= classes)).any():
                raise UserError(
                    f"log_loss has class numbers from {int(targets.min())} to {int(targets.max())} for predictions of "
                    f"{classes} classes, expected 0 to {classes - 1}: change the dataset's targets or the model"
                )
            true = decisions.gather(1, targets[:, None])[:, 0].double()
            total = decisions.sum(1, dtype=torch.float64)
            return _weighted(-(true / total).clamp(eps, 1 - eps).log(), targets, weights)
        _same_shape("log_loss", decisions, targets)
        p, t = decisions.double().clamp(eps, 1 - eps), targets.double()
        return _weighted(-torch.xlogy(t, p) - torch.xlogy(1 - t, 1 - p), targets, weights)

    return Metric("log_loss", stats, higher_is_better=False)


def mae(columnwise: bool = False) -> Metric:
    """Mean absolute error of [B, ...]; with `columnwise` the mean over the columns' errors."""
    return _regression("mae", torch.abs, lambda x: x, columnwise)


def rmse(columnwise: bool = False) -> Metric:
    """Root mean squared error of [B, ...]; with `columnwise` the mean over the columns' roots (MCRMSE)."""
    return _regression("rmse", torch.square, math.sqrt, columnwise)


def rmsle(columnwise: bool = False) -> Metric:
    """RMSE of log(1 + x). Raises UserError on a decision of -1 or less, which Kaggle refuses too."""
    return _regression("rmsle", torch.square, math.sqrt, columnwise, logarithms=True)


def _regression(name: str, size: Callable, root: Callable, columnwise: bool, logarithms: bool = False) -> Metric:
    def stats(decisions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        _same_shape(name, decisions, targets)
        decisions, targets = decisions.double(), targets.double()
        if logarithms:
            if bool((decisions <= -1).any()):
                raise UserError(f"{name}: found a decision of {float(decisions.min()):.4g}: clip at 0 in postprocess")
            decisions, targets = decisions.log1p(), targets.log1p()
        errors = size(decisions - targets)
        if not columnwise:
            return _weighted(errors, targets, weights)
        return torch.stack(_counted(errors, targets, weights), 1).reshape(len(targets), 2, -1)  # [B, 2, T]

    def value(sums: Tensor, count: float) -> float:
        if not columnwise:
            return root(mean(sums, count))
        return float(np.mean([root(_ratio(part, whole)) for part, whole in sums.T.tolist()]))

    plain = root is not math.sqrt and not columnwise
    return Metric(name, stats, mean if plain else value, higher_is_better=False)


def quadratic_kappa() -> Metric:
    """Cohen's kappa of whole numbers [B] or [B, 1] with quadratic weights: 1 - E (d - t)^2 / E' (d - t)^2.

    E' is the mean over random pairs of rows. The metric is additive, and needs no list of the ratings.
    """

    def stats(decisions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        _same_shape("quadratic_kappa", decisions, targets)
        if targets.numel() != len(targets):
            raise UserError(f"quadratic_kappa has targets {list(targets.shape)}: expected one rating for each row, [B]")
        d, t = decisions.double().flatten(), targets.double().flatten()
        if bool((d != d.round()).logical_and(~d.isnan()).any()):
            raise UserError("quadratic_kappa compares ratings: round the decisions in postprocess")
        known = ~t.isnan()
        w = known.double() if weights is None else known * weights.double()
        t = torch.where(known, t, 0)
        return torch.stack([w, w * (d - t) ** 2, w * d, w * d**2, w * t, w * t**2], 1)

    def value(sums: Tensor, count: float) -> float:
        apart, d, d2, t, t2 = (sums[1:] / sums[0]).tolist()
        return 1 - apart / expected if (expected := d2 + t2 - 2 * d * t) > 0 else math.nan

    return Metric("quadratic_kappa", stats, value)


def map_at_k(k: int) -> Metric:
    """Mean average precision at k: decisions are class numbers int [B, m], best first (-1 for none), or scores [B, C].

    Targets are the one true class, int [B], or 0/1 [B, C]. A class that is predicted twice counts once; a row without a
    true class scores 0.
    """

    def stats(decisions: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        if decisions.ndim == 1 and not decisions.is_floating_point():
            decisions = decisions[:, None]
        if decisions.ndim != 2 or targets.ndim > 2:
            raise UserError(f"map_at_{k}: decisions {tuple(decisions.shape)} and targets {tuple(targets.shape)}")
        scores = decisions.is_floating_point()
        ranked = (decisions.argsort(dim=1, descending=True, stable=True) if scores else decisions)[:, :k]
        if targets.ndim == 1:
            hits, true = ranked == targets[:, None], torch.ones_like(targets)
        else:
            hits, true = (targets > 0).gather(1, ranked.clamp(min=0)), (targets > 0).sum(1)
        hits &= (ranked >= 0) & ~(ranked[:, :, None] == ranked[:, None, :]).tril(-1).any(2)
        places = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
        precision = (hits.cumsum(1).double() / places * hits).sum(1) / true.clamp(1, k)
        return _weighted(precision, None, weights)

    return Metric(f"map_at_{k}", stats)


def roc_auc(average: Literal["macro", "micro"] = "macro", one_class: Literal["nan", "skip"] = "nan") -> Metric:
    """Area under the ROC curve of scores [B] or [B, L], ties counted half; class numbers [B] are taken as one-hot.

    "macro" is the mean over columns, "micro" is over all entries at once. A column with a single class has no AUC:
    `one_class` makes the score NaN, or leaves the column out of the mean.
    """
    return Metric("roc_auc", whole=_by_column("roc_auc", _auc, average, one_class))


def average_precision(
    average: Literal["macro", "micro"] = "macro", one_class: Literal["nan", "skip"] = "nan"
) -> Metric:
    """Area under the precision-recall steps, as scikit-learn's average_precision_score; arguments as for `roc_auc`."""
    return Metric("average_precision", whole=_by_column("average_precision", _precision_area, average, one_class))


def spearman() -> Metric:
    """Spearman's rank correlation of [B], or the mean over the columns of [B, T]; without weights."""
    from scipy.stats import rankdata

    def of(decisions: np.ndarray, targets: np.ndarray, weights: None) -> float:
        d, t = (x - x.mean() for x in (rankdata(decisions), rankdata(targets)))
        return _ratio(float(d @ t), math.sqrt(float(d @ d) * float(t @ t)))

    return Metric("spearman", whole=_by_column("spearman", of, "macro", "nan"))


def _by_column(name: str, of: Callable, average: str, one_class: str) -> Callable[..., float]:
    """Make a whole-set function from one for a column: `of(decisions [n], targets [n], weights [n] or None)`."""

    def whole(decisions: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None) -> float:
        if decisions.ndim == 2 and targets.ndim == 1 and targets.dtype.kind in "iu":
            targets = targets[:, None] == np.arange(decisions.shape[1])
        _same_shape(name, decisions, targets)
        if average == "micro":
            weights = None if weights is None else np.repeat(weights, decisions.size // len(weights))
            decisions, targets = decisions.reshape(-1), targets.reshape(-1)
        columns = (len(decisions), -1)
        scores = []
        for found, true in zip(decisions.reshape(columns).T, targets.reshape(columns).T, strict=True):
            known = ~np.isnan(true) if true.dtype.kind == "f" else slice(None)
            parts = found[known], true[known], None if weights is None else weights[known]
            scores.append(of(*parts) if len(parts[0]) else math.nan)  # NaN: no target of the column is known
        there = [score for score in scores if not (one_class == "skip" and math.isnan(score))]
        return float(np.mean(there)) if there else math.nan

    return whole


def _auc(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray | None) -> float:
    positive = truth > 0.5
    above, below = scores[positive], scores[~positive]
    if weights is None:
        below, mass, of_above = np.sort(below), np.arange(len(below) + 1.0), np.ones(len(above))
        above = np.sort(above)  # searchsorted is faster for sorted values
    else:
        order = np.argsort(below)
        below, of_above = below[order], weights[positive].astype(np.float64)
        mass = np.append(0.0, np.cumsum(weights[~positive][order], dtype=np.float64))
    beaten = mass[np.searchsorted(below, above, "left")] + mass[np.searchsorted(below, above, "right")]
    return _ratio(float(of_above @ beaten), 2 * float(of_above.sum()) * float(mass[-1]))


def _precision_area(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray | None) -> float:
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], truth[order] > 0.5
    weights = np.ones(len(order)) if weights is None else weights[order].astype(np.float64)
    ends = np.append(np.flatnonzero(scores[1:] != scores[:-1]), len(order) - 1)  # the last of every tie
    hits, found = np.cumsum(weights * positive)[ends], np.cumsum(weights)[ends]
    return _ratio(float((np.diff(hits, prepend=0.0) * hits / np.where(found > 0, found, 1)).sum()), float(hits[-1]))


def _of_classes(decisions: Tensor, targets: Tensor) -> bool:
    """Whether these are scores [B, C, ...] for class numbers [B, ...]."""
    return (
        decisions.is_floating_point()
        and not targets.is_floating_point()
        and decisions.ndim == targets.ndim + 1
        and decisions.shape[2:] == targets.shape[1:]
    )


def _same_shape(name: str, decisions: Any, targets: Any) -> None:
    if decisions.shape != targets.shape:
        raise UserError(
            f"metric {name}: decisions {list(decisions.shape)} do not fit targets {list(targets.shape)}, expected the "
            "same shape: pick the part that is compared with Metric.on, or change postprocess or the dataset"
        )


def _decided(name: str, decisions: Tensor, threshold: float | None) -> Tensor:
    if not decisions.is_floating_point():
        return decisions
    if threshold is None:
        raise UserError(
            f"metric {name} needs decisions, found scores ({decisions.dtype}): decide in Postprocess's `apply`, or, if "
            "the CSV holds scores, give the metric a threshold="
        )
    return decisions > threshold


def _binary(name: str, decisions: Tensor, targets: Tensor, threshold: float | None) -> tuple[Tensor, Tensor]:
    """Both as bool of one shape; unknown targets are false in both."""
    _same_shape(name, decisions, targets)
    found = _decided(name, decisions, threshold) > 0
    return (found & ~targets.isnan() if targets.is_floating_point() else found), targets > 0.5


def _column(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(like.device).view(-1, *[1] * (like.ndim - 1))


def _weighted(values: Tensor, targets: Tensor | None, weights: Tensor | None) -> Tensor:
    """Statistics for `mean`: each sample's mean [B]; with unknown or weighted entries, its sum and weight [B, 2]."""
    if weights is None and (targets is None or not targets.is_floating_point()):
        return values.flatten(1).mean(1) if values.ndim > 1 else values
    sums = [x.flatten(1).sum(1) if x.ndim > 1 else x for x in _counted(values, targets, weights)]
    return torch.stack(sums, 1)


def _counted(values: Tensor, targets: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Each entry times its weight, and its weight, which is 0 where the target is unknown. float64 [B, ...] both"""
    mass = torch.ones_like(values, dtype=torch.float64)
    if targets is not None and targets.is_floating_point():
        mass = mass * ~targets.isnan()
    if weights is not None:
        mass = mass * _column(weights.double(), values)
    return torch.where(mass > 0, values, 0) * mass, mass
