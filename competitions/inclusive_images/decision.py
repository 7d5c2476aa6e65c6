"""From scores to label sets: how many labels an image keeps, at most how many per cluster, and the mean F2."""

from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from common.loading.keys import keyed_seed
from competitions.inclusive_images.label_embedding import LabelEmbedding

LONGEST = 40  # only so many labels of an image, the best ones, are considered
TUNED_ROWS = 20_000  # largest number of held-out images that the rule is chosen on
PARTS = 5  # for the unbiased estimate: the rule is chosen on four fifths and scored on the fifth
# Labels below this rank count as negatives if the loss was a softmax against all negatives.
NEGATIVES_FROM = 150


@dataclass(frozen=True)
class Rule:
    """How many of an image's labels, sorted by falling score, are kept.

    "threshold": those with a score of at least `level`. "expected": the k that maximises 5 S_k / (4 `level` S + k), the
    expected F2 if scores are probabilities; S_k is the sum of the k best scores and S that of all.
    """

    kind: str = "expected"
    level: float = 1.0
    least: int = 1
    most: int = 20
    trim: int = 0  # most labels kept from one cluster of similar labels; 0 is no limit


def against_negatives(logits: Tensor) -> Tensor:
    """Probability of every label [B, m] from a softmax over that label and only the labels below a rank."""
    rank = min(NEGATIVES_FROM, logits.shape[1] // 2)
    rest = logits.topk(logits.shape[1] - rank, dim=1, largest=False).values.logsumexp(1, keepdim=True)
    return torch.sigmoid(logits - rest)


def apply(scores: Tensor, tuned: dict[str, Any], default: Rule, prior: np.ndarray, clusters: np.ndarray) -> dict:
    """Scores [B, m] -> {"labels": uint8 [B, m] with at least one label per row, "best": int64 [B, 5]}.

    `prior` are the columns set for a row in which the rule keeps no label; `clusters` [m] is the cluster of each label.
    """
    rule = Rule(**tuned["rule"]) if "rule" in tuned else default
    ranked = Ranked.of(scores.detach().cpu().numpy())
    kept = ranked.trimmed(clusters, rule.trim)
    lengths = lengths_of(kept, rule)
    labels = np.zeros(scores.shape, np.uint8)
    row, place = np.nonzero(np.arange(kept.columns.shape[1]) < lengths[:, None])
    labels[row, kept.columns[row, place]] = 1
    labels[np.ix_(np.flatnonzero(lengths == 0), prior)] = 1
    best = torch.from_numpy(ranked.columns[:, :5].astype(np.int64))
    return {"labels": torch.from_numpy(labels).to(scores.device), "best": best.to(scores.device)}


@dataclass(frozen=True)
class Ranked:
    """The best k labels of n images by falling score: `columns` int [n, k], `scores` [n, k]; `total` [n] sums all m."""

    columns: np.ndarray
    scores: np.ndarray
    total: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray) -> "Ranked":
        scores = scores.astype(np.float32)
        length = min(LONGEST, scores.shape[1])
        values, columns = torch.from_numpy(scores).topk(length, dim=1)
        return cls(columns.numpy(), values.numpy(), scores.sum(1, dtype=np.float64))

    def trimmed(self, clusters: np.ndarray, trim: int) -> "Ranked":
        """The same with at most `trim` labels per cluster; the surplus labels move to the end with score -1."""
        if not trim:
            return self
        of_label = clusters[self.columns]  # [n, k]
        earlier = (of_label[:, :, None] == of_label[:, None, :]) & np.tri(of_label.shape[1], k=-1, dtype=bool)
        scores = np.where(earlier.sum(2) < trim, self.scores, -1.0).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")
        return Ranked(np.take_along_axis(self.columns, order, 1), np.take_along_axis(scores, order, 1), self.total)


def lengths_of(ranked: Ranked, rule: Rule) -> np.ndarray:
    """How many of its labels every image keeps under `rule`, int [n]."""
    usable = (ranked.scores >= 0).sum(1)
    if rule.kind == "threshold":
        wanted = (ranked.scores >= rule.level).sum(1)
    else:
        positions = np.arange(1, ranked.scores.shape[1] + 1)
        gains = np.cumsum(np.maximum(ranked.scores, 0), 1) / (4 * rule.level * ranked.total[:, None] + positions)
        wanted = gains.argmax(1) + 1
    return np.minimum(np.clip(wanted, rule.least, rule.most), usable)


def prefix_f2(ranked: Ranked, truth: csr_matrix, prior: np.ndarray) -> np.ndarray:
    """F2 of keeping the first 0..k labels, float64 [n, k + 1]; keeping none gives the prior labels."""
    dense = truth.astype(bool)
    rows = np.repeat(np.arange(len(ranked.columns)), ranked.columns.shape[1])
    hits = np.asarray(dense[rows, ranked.columns.ravel()]).reshape(ranked.columns.shape)
    sizes = np.diff(truth.indptr)[:, None]
    lengths = np.arange(1, hits.shape[1] + 1)
    scores = 5 * np.cumsum(hits, 1) / (4 * sizes + lengths)
    of_prior = 5 * np.asarray(dense[:, prior].sum(1)).reshape(-1, 1) / (4 * sizes + len(prior))
    return np.hstack([of_prior, scores])


def tune(
    scores: np.ndarray,
    truth: csr_matrix,
    prior: np.ndarray,
    clusters: np.ndarray,
    trims: tuple[int, ...],
    default: Rule,
    seed: int,
) -> dict[str, Any]:
    """The rule with the best mean F2 on held-out scores [n, m], and an unbiased estimate of its F2.

    The rule must be significantly better than `default`, see `chosen`. For "score" the rule is chosen on four fifths of
    the images and scored on the fifth, for each fifth.
    """
    some = np.random.default_rng(keyed_seed(seed, 7)).permutation(len(scores))[:TUNED_ROWS]
    ranked = Ranked.of(np.asarray(scores[np.sort(some)]))
    truth = truth[np.sort(some)]
    rules, table = [], []
    for trim in trims:
        kept = ranked.trimmed(clusters, trim)
        quality = prefix_f2(kept, truth, prior)
        for rule in [default, *candidates(ranked)]:
            rules.append(replace(rule, trim=trim))
            table.append(quality[np.arange(len(quality)), lengths_of(kept, rule)])
    table = np.array(table)  # [rules, n]
    part = np.arange(table.shape[1]) % PARTS
    held_out = np.zeros(table.shape[1])
    for number in range(PARTS):
        own = part == number
        held_out[own] = table[0 if own.all() else chosen(table[:, ~own]), own]
    return {"rule": asdict(rules[chosen(table)]), "score": float(held_out.mean())}


def chosen(table: np.ndarray) -> int:
    """The best row of F2 per image [rules, n] if it beats row 0, the default, by two standard errors; else 0.

    The best of hundreds of rules is partly best by chance: on 250 images it was 0.004 worse than the default.
    """
    best = int(table.mean(1).argmax())
    gains = table[best] - table[0]
    return best if gains.mean() > 2 * gains.std() / np.sqrt(len(gains)) else 0


def candidates(ranked: Ranked) -> list[Rule]:
    """Rules to try: thresholds at quantiles of the scores, factors on their sum, and bounds on the number of labels."""
    levels = np.unique(np.quantile(ranked.scores[:, :20], np.linspace(0.02, 0.98, 40)).round(5))
    bounds = list(product((0, 1, 2, 3), (5, 8, 12, 20)))
    thresholds = [Rule("threshold", float(level), least, most) for level in levels for least, most in bounds]
    expected = [
        Rule("expected", level, least, 20) for level in np.geomspace(0.1, 4, 25).tolist() for least in (1, 2, 3)
    ]
    return [*expected, *thresholds]


def cluster(embedding: LabelEmbedding, count: int) -> np.ndarray:
    """Cluster of every label, int [m]: average linkage on cosine distances of the label vectors.

    Every label without a vector is its own cluster. 7,178 labels take some seconds and 400 MB.
    """
    known, units = embedding.known, embedding.unit_vectors
    clusters = np.arange(len(embedding.vectors)) + len(embedding.vectors)
    if len(known) <= count:
        return clusters
    from sklearn.cluster import AgglomerativeClustering

    distances = np.clip(1 - units @ units.T, 0, 2)
    clusters[known] = AgglomerativeClustering(count, metric="precomputed", linkage="average").fit(distances).labels_
    return clusters
