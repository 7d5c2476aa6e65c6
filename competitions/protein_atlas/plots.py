"""The plots of a finished run: co-occurrence of labels, F1 against frequency, and the worst images in colour."""

from collections.abc import Callable

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from common.metrics import f_beta
from common.predictions import read_predictions, row_numbers, unpack
from common.report import Report, subplots, without_frame
from common.run import Run
from common.vision.store import ImageStore

NAMES = (
    *("Nucleoplasm", "Nuclear membrane", "Nucleoli", "Nucleoli fibrillar center", "Nuclear speckles", "Nuclear bodies"),
    *("Endoplasmic reticulum", "Golgi apparatus", "Peroxisomes", "Endosomes", "Lysosomes", "Intermediate filaments"),
    *("Actin filaments", "Focal adhesion sites", "Microtubules", "Microtubule ends", "Cytokinetic bridge"),
    *("Mitotic spindle", "Microtubule organizing center", "Centrosome", "Lipid droplets", "Plasma membrane"),
    *("Cell junctions", "Mitochondria", "Aggresome", "Cytosol", "Cytoplasmic bodies", "Rods & rings"),
)
EACH = 2  # false negatives shown per label, and as many false positives


def report(
    images: ImageStore, ids: list[str], labels: np.ndarray, apply: Callable[..., Tensor], run: Run, page: Report
) -> None:
    """Add the plots to the run's report; `labels` [n, 28] are the true labels of the images."""
    page.heading("Labels that come together")
    page.figure(together(labels), "together", "Share of the images with the row's label that also have the column's")
    kept = read_predictions(run.path, "oof")
    if kept is None:
        return
    rows, scores, tuned = row_numbers(run.path, "oof", ids), unpack(kept), run.result["tuned"]
    found, truth = apply(scores, tuned).numpy(), labels[rows]
    there = np.flatnonzero(truth.any(0))
    f1 = {label: f_beta(1, "micro").score(found[:, label], truth[:, label]) for label in there}
    page.heading("F1 of the labels")
    always = (2 * truth.sum(0) / (truth.sum(0) + len(truth)))[there].mean()
    page.text(f"Giving every label to every image has a macro F1 of {always:.4f}.")
    words = "F1 of each label against its frequency in the training images"
    page.figure(against_frequency(f1, labels.mean(0)), "frequency", words)
    cells = zip(there, truth.sum(0)[there], found.sum(0)[there], f1.values(), strict=True)
    lines = [(NAMES[label], *rest, tuned["thresholds"][label]) for label, *rest in cells]
    page.table(["label", "images", "found", "F1", "threshold"], sorted(lines, key=lambda line: line[3]))
    words = (
        "For each label, images with it and the lowest scores, then without it and the highest: protein green, "
        "microtubules red, nucleus blue, endoplasmic reticulum yellow"
    )
    page.figure(worst(images, rows, scores.numpy(), truth > 0, there), "worst_of_labels", words)


def together(labels: np.ndarray) -> Figure:
    """Co-occurrence matrix of those of the labels [n, 28] that occur."""
    there = np.flatnonzero(labels.any(0))
    own = labels[:, there].astype(np.int64)
    parts = (own.T @ own) / own.sum(0)[:, None]
    figure, axes = subplots(9, 8)
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    names = [f"{label} {NAMES[label]} ({count})" for label, count in zip(there, own.sum(0), strict=True)]
    axes.set_xticks(range(len(there)), there)
    axes.set_yticks(range(len(there)), names)
    return figure


def against_frequency(f1: dict[int, float], rates: np.ndarray) -> Figure:
    figure, axes = subplots(8, 5)
    for label, score in f1.items():
        axes.scatter(rates[label], score, color="C0")
        axes.annotate(NAMES[label], (rates[label], score), fontsize=7)
    axes.set(xscale="log", xlabel="part of the training images", ylabel="F1", ylim=(-0.02, 1.02))
    axes.xaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
    axes.xaxis.set_minor_formatter(lambda rate, _: f"{rate:g}" if f"{rate:e}"[0] in "25" else "")  # all overlap
    return figure


def worst(images: ImageStore, rows: np.ndarray, scores: np.ndarray, truth: np.ndarray, labels: np.ndarray) -> Figure:
    """A row per label: the EACH lowest scored images that have it, and the EACH highest scored ones without it."""
    figure, grid = subplots(4.4 * EACH, 2.2 * len(labels), len(labels), 2 * EACH, squeeze=False)
    for line, label in zip(grid, labels, strict=True):
        ranked = np.argsort(scores[:, label], kind="stable")
        missed, wrong = ranked[truth[ranked, label]][:EACH], ranked[~truth[ranked, label]][::-1][:EACH]
        for axes in line:
            without_frame(axes)
        for axes, row in [*zip(line, missed, strict=False), *zip(line[EACH:], wrong, strict=False)]:
            axes.imshow(composed(images[rows[row]]))
            axes.set_title(f"{NAMES[label][:18]} {scores[row, label]:.2f}", fontsize=7)
    return figure


def composed(image: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 4] of red, green, blue, yellow -> RGB [H, W, 3]; yellow at half its strength."""
    yellow = image[:, :, 3] // 2
    return np.stack([np.maximum(image[:, :, 0], yellow), np.maximum(image[:, :, 1], yellow), image[:, :, 2]], -1)
