"""The inclusive_images part of a run's report: the label vectors, and precision and recall by label frequency."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from common.predictions import read_predictions, row_numbers, unpack
from common.report import Report, subplots
from common.run import Run
from competitions.inclusive_images.label_embedding import LabelEmbedding
from competitions.inclusive_images.rows import Rows

HEAT_LABELS, MAP_LABELS = 40, 150  # number of the most frequent labels in each plot
BANDS = 4  # groups of labels by frequency
SHOWN_ROWS = 20_000  # held-out images, evenly spaced, used for tables and curves
CHUNK = 256  # images per call of `decide`


def report(run: Run, page: Report, files: Rows, embedding: LabelEmbedding | None, decide: Callable[..., Any]) -> None:
    """Add the label vectors and the scores by label frequency to the run's report."""
    if embedding is not None:
        names = files.index.names
        known = set(embedding.known.tolist())
        common = [label for label in np.argsort(-embedding.counts, kind="stable").tolist() if label in known]
        page.figure(
            similarities(embedding, common[:HEAT_LABELS], names),
            "similarity",
            "Cosine similarity of the most frequent labels, ordered so that similar ones are neighbours",
        )
        page.figure(vector_map(embedding, common[:MAP_LABELS], names), "map", "The label vectors in two dimensions")
    scores = read_predictions(run.path, "oof")
    if scores is not None:
        _held_out(page, run, scores, files, decide)


def _held_out(page: Report, run: Run, scores: np.ndarray, files: Rows, decide: Callable[..., Any]) -> None:
    result, rows = run.result, row_numbers(run.path, "oof", files.ids)
    shown = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), SHOWN_ROWS)).astype(int))
    scores, truth = scores[shown], files.labels[rows[shown]]
    page.table(["rule", "value"], result["tuned"]["rule"].items())
    page.text(
        f"Mean F2 on {len(rows)} images that the network was not trained on: {result['metrics']['f2']:.4f} with the "
        f"rule that is best for these images; {result['score']:.4f} with rules tuned on four fifths of them and "
        f"scored on the other fifth. Below: {len(shown)} of these images."
    )
    bands = frequency_bands(files.counts)
    parts = (scores[start : start + CHUNK] for start in range(0, len(scores), CHUNK))
    found = torch.cat([decide(unpack(part), result["tuned"])["labels"] for part in parts]).numpy() > 0
    facts = []
    for name, labels in bands.items():
        there, chosen = truth[:, labels].toarray() > 0, found[:, labels]
        hits = (there & chosen).sum()
        facts.append((name, len(labels), hits / max(chosen.sum(), 1), hits / max(there.sum(), 1)))
    page.table(["training images of a label", "labels", "precision", "recall"], facts)
    page.figure(curves(scores, truth, bands), "curves", "Precision and recall of labels by their frequency in training")


def frequency_bands(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of the labels that occur, split by frequency into bands of equal size."""
    seen = np.flatnonzero(counts)
    ordered = seen[np.argsort(-counts[seen], kind="stable")]
    parts = [part for part in np.array_split(ordered, BANDS) if len(part)]
    return {f"{place + 1}: {counts[part[-1]]:,} to {counts[part[0]]:,}": part for place, part in enumerate(parts)}


def curves(scores: np.ndarray, truth: Any, bands: dict[str, np.ndarray]) -> Figure:
    """Precision-recall curves, with all labels of a band pooled."""
    figure, axes = subplots(7, 4.6)
    for name, labels in bands.items():
        values, hits = scores[:, labels].astype(np.float32).ravel(), truth[:, labels].toarray().ravel() > 0
        if not hits.any():
            continue
        order = np.argsort(-values, kind="stable")
        found = np.cumsum(hits[order])
        shown = np.unique(np.geomspace(1, len(order), 300).astype(int)) - 1
        axes.plot(found[shown] / hits.sum(), found[shown] / (shown + 1), label=name)
    axes.set(xlabel="recall", ylabel="precision", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, title="training images of a label")
    return figure


def similarities(embedding: LabelEmbedding, labels: list[int], names: tuple[str, ...]) -> Figure:
    """Cosines of `labels` as a heat map, the labels ordered so that similar ones are neighbours."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    vectors = embedding.units(labels)
    if len(labels) > 2:
        order = leaves_list(linkage(vectors, "average", optimal_ordering=True))
        vectors, labels = vectors[order], [labels[place] for place in order]
    side = max(4.0, 0.24 * len(labels))
    figure, axes = subplots(side + 1.5, side)
    shown = axes.imshow(vectors @ vectors.T, vmin=-1, vmax=1, cmap="RdBu_r")
    words = [names[label] for label in labels]
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=7)
    axes.set_yticks(range(len(words)), words, fontsize=7)
    figure.colorbar(shown, shrink=0.6)
    return figure


def vector_map(embedding: LabelEmbedding, labels: list[int], names: tuple[str, ...]) -> Figure:
    """The labels on a map: t-SNE on cosine distances, or for up to 10 labels the first two components."""
    vectors = embedding.units(labels)
    if len(labels) > 10:
        from sklearn.manifold import TSNE

        distances = np.clip(1 - vectors @ vectors.T, 0, 2)
        near = min(15.0, (len(labels) - 1) / 3)
        places = TSNE(perplexity=near, metric="precomputed", init="random", random_state=0).fit_transform(distances)
    else:
        places = np.pad(vectors, ((0, 0), (0, 2)))[:, :2]
    figure, axes = subplots(12, 9)
    sizes = np.sqrt(embedding.counts[labels] / embedding.counts.max())
    axes.scatter(*places.T, s=10 + 120 * sizes, alpha=0.4, linewidth=0)
    for place, label in zip(places, labels, strict=True):
        axes.annotate(names[label], place, fontsize=7, ha="center")
    axes.set_axis_off()
    return figure
