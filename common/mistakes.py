"""The mistakes of a run, for its report: by class, by label or as residuals, and the worst rows with their images."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.batch import map_tree
from common.loading.loader import in_order
from common.metrics import average_precision, roc_auc, without_ones
from common.report import Report, shown, subplots, without_frame

ROWS_SHOWN = 12  # with their images where they have some
CLASSES_SHOWN = 40  # in a table, and in a confusion matrix
LABELS_SCORED, COLUMNS_PLOTTED, LONGEST_NAME, WIDEST_IMAGE = 200, 4, 28, 256  # the last two in characters and pixels
LARGEST = 50_000_000  # numbers; of more predictions, evenly spaced rows are used
Images = Callable[[np.ndarray], Sequence[Any]]


def mistakes(
    page: Report,
    predictions: np.ndarray,
    targets: np.ndarray,
    ids: Sequence[str] = (),
    names: Sequence[str] = (),
    images: Images = lambda places: (),
) -> None:
    """Add to the page how out-of-fold `predictions` [m, ...] differ from `targets` [m, ...]. Shapes decide the kind:

    Classes: scores [m, C] for class numbers [m], or [m] for 0 and 1. Labels: [m, L] for 0 and 1. Numbers: [m], [m, T].
    For any other shape, such as masks, nothing is added. `ids` [m] name the rows, `names` the classes, labels or
    columns. `images(places)` returns the inputs of the samples at `places` in 0..m-1; inputs that are no images are
    left out.
    """
    predictions, targets = (values.reshape(without_ones(values.shape)) for values in (predictions, targets))
    of_classes = predictions.ndim == 2 and targets.ndim == 1 and targets.dtype.kind in "iub"
    if targets.ndim > 2 or not (of_classes or predictions.shape == targets.shape):
        return
    known = np.isfinite(targets).reshape(len(targets), -1).all(1)
    known &= (targets >= 0) & (targets < predictions.shape[1]) if of_classes else True
    places = np.flatnonzero(known)[:: -(-predictions.size // LARGEST)]
    if not len(places):
        return
    predictions, targets = predictions[places].astype(np.float32), targets[places]
    ids = [str(ids[place]) if len(ids) else str(place) for place in places]
    if len(places) < len(known):
        page.text(f"Below: {len(places):,} of {len(known):,} rows, evenly spaced among those with known targets.")
    rest = (ids, names, lambda rows: images(places[rows]))
    if of_classes:
        _classes(page, predictions, targets.astype(np.int64), *rest)
    elif not np.isin(targets, (0, 1)).all():
        _numbers(page, predictions, targets.astype(np.float32), *rest)
    elif targets.ndim == 1:
        _classes(page, np.stack([1 - predictions, predictions], 1), targets.astype(np.int64), *rest)
    else:
        _labels(page, predictions, targets > 0.5, *rest)


def _classes(page, scores, truth, ids, names, images) -> None:
    """Add the confusion matrix, the quality of every class and the worst mistakes, from scores [m, C], truth [m]."""
    count = scores.shape[1]
    names, found = names_or_numbers(names, count), scores.argmax(1)
    confusion = np.zeros((count, count), np.int64)
    np.add.at(confusion, (truth, found), 1)
    page.heading("Classes")
    if count <= CLASSES_SHOWN:
        page.figure(
            confusion_matrix(confusion, names),
            "confusion",
            "Confusion matrix: true class (row), predicted class (column)",
        )
    true, given, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    f1 = 2 * right / np.maximum(true + given, 1)
    wrong = confusion - np.diag(right)
    order = np.argsort(f1, kind="stable")
    rows = [
        (names[c], true[c], right[c] / true[c], right[c] / max(given[c], 1), f1[c], _most(wrong[c], names))
        for c in order[true[order] > 0]
    ]
    more = f", the worst {CLASSES_SHOWN} of {len(rows)}" if len(rows) > CLASSES_SHOWN else ", the worst first"
    page.text(f"Classes by F1{more}.")
    page.table(["class", "rows", "recall", "precision", "F1", "most often taken for"], rows[:CLASSES_SHOWN])
    of_true, of_found = scores[np.arange(len(truth)), truth], scores.max(1)
    mistakes = np.flatnonzero(found != truth)
    page.text(f"{len(mistakes):,} mistakes in {len(truth):,} rows.")
    worst = mistakes[np.argsort(of_true[mistakes], kind="stable")][:ROWS_SHOWN]
    rest = np.setdiff1d(mistakes, worst)
    certain = rest[np.argsort(-of_found[rest], kind="stable")][:ROWS_SHOWN]

    def told(row: int) -> tuple:
        return ids[row], _with(names[truth[row]], of_true[row]), _with(names[found[row]], of_found[row])

    header = ["row", "true", "predicted"]
    _gallery(page, "worst", "The worst mistakes: the true class has the lowest score", header, worst, told, images)
    _gallery(page, "certain", "The most confident of the other mistakes", header, certain, told, images)


def _labels(page, scores, truth, ids, names, images) -> None:
    """Add the quality of the labels and the rows with the highest log loss, from scores and truth [m, L]."""
    names, counts = names_or_numbers(names, scores.shape[1]), truth.sum(0)
    frequent = np.argsort(-counts, kind="stable")[:LABELS_SCORED]
    rows = []
    for label in frequent[counts[frequent] > 0]:
        ap, auc = (metric.score(scores[:, label], truth[:, label]) for metric in (average_precision(), roc_auc()))
        rows.append((names[label], counts[label], ap, auc))
    page.heading("Labels")
    page.text(f"The worst of the {len(rows)} most frequent labels, by average precision.")
    page.table(["label", "rows", "average precision", "ROC AUC"], sorted(rows, key=lambda row: row[2])[:CLASSES_SHOWN])
    chance = np.clip(scores, 1e-7, 1 - 1e-7)
    loss = -np.where(truth, np.log(chance), np.log1p(-chance)).mean(1)

    def told(row: int) -> tuple:
        missed = np.where(truth[row], scores[row], np.inf).argmin() if truth[row].any() else None
        added = np.where(truth[row], -np.inf, scores[row]).argmax()
        words = "none" if missed is None else _with(names[missed], scores[row, missed])
        return ids[row], words, _with(names[added], scores[row, added]), loss[row]

    header = ["row", "least likely true label", "likeliest wrong label", "log loss"]
    worst = np.argsort(-loss, kind="stable")[:ROWS_SHOWN]
    _gallery(page, "worst", "The rows with the highest log loss", header, worst, told, images)


def _numbers(page, found, truth, ids, names, images) -> None:
    """Add the residuals of numbers [m] or [m, T], column by column, and the rows that are furthest off."""
    found, truth = (values.reshape(len(values), -1) for values in (found, truth))
    names, residuals = names_or_numbers(names, found.shape[1]), found - truth
    page.heading("Residuals")
    rows = [
        (name, r.mean(), np.abs(r).mean(), np.sqrt(np.square(r).mean()), 1 - r.var() / t.var() if t.var() else "")
        for name, r, t in zip(names, residuals.T, truth.T, strict=True)
    ]
    page.table(["column", "mean residual", "MAE", "RMSE", "explained variance"], rows[:CLASSES_SHOWN])
    words = "Prediction against truth, and the distribution of prediction minus truth"
    page.figure(residual_plots(found[:, :COLUMNS_PLOTTED], truth[:, :COLUMNS_PLOTTED], names), "residuals", words)
    spread = truth.std(0)
    off = np.abs(residuals / np.where(spread > 0, spread, 1))

    def told(row: int) -> tuple:
        column = off[row].argmax()
        return ids[row], names[column], *(values[row, column] for values in (truth, found, residuals))

    header = ["row", "column", "truth", "prediction", "residual"]
    worst = np.argsort(-off.max(1), kind="stable")[:ROWS_SHOWN]
    _gallery(page, "worst", "The rows that are furthest off", header, worst, told, images)


def names_or_numbers(names: Sequence[str], count: int) -> list[str]:
    return [str(name) for name in names] if len(names) == count else [str(number) for number in range(count)]


def _most(wrong: np.ndarray, names: list[str]) -> str:
    return f"{names[wrong.argmax()]} ({wrong.max()})" if wrong.any() else ""


def _gallery(page, name, words, header, rows, told, images) -> None:
    """Add the images of some rows, or a table where they have none."""
    if not len(rows):
        return
    facts = [told(row) for row in rows]
    there = [
        (image, fact) for image, fact in zip(map(as_image, images(rows)), facts, strict=False) if image is not None
    ]
    if there:
        lines = [[_short(cells[0]), *map("{} {}".format, header[1:], map(shown, cells[1:]))] for _, cells in there]
        page.figure(gallery([image for image, _ in there], lines), name, words)
    else:
        page.text(f"{words}.")
        page.table(header, facts)


def gallery(images: Sequence[np.ndarray], words: Sequence[Sequence[str]]) -> Any:
    """A figure of images with some lines of words above each."""
    across = min(4, len(images))
    down = -(-len(images) // across)
    height = 0.8 + 2.7 * max(image.shape[0] / image.shape[1] for image in images)
    figure, grid = subplots(2.8 * across, min(height, 6) * down, down, across, squeeze=False)
    for axes in grid.flat:
        without_frame(axes)
    for axes, image, lines in zip(figure.axes, images, words, strict=False):
        axes.imshow(
            image, cmap="gray", vmin=0, vmax=255, interpolation="nearest" if max(image.shape[:2]) < 64 else None
        )
        axes.set_title("\n".join(lines), fontsize=8)
    return figure


def _with(name: str, score: float) -> str:
    return f"{_short(name)} ({score:.3g})"


def _short(word: str) -> str:
    word = " ".join(word.split())
    return word if len(word) <= LONGEST_NAME else f"{word[: LONGEST_NAME - 1]}…"


def samples(dataset: Any, rows: np.ndarray) -> list[Any]:
    """The inputs of some rows of a dataset, one by one and on the CPU: for the `images` of `mistakes`."""
    batch = next(in_order(dataset, np.asarray(rows), len(rows), seed=0))
    inputs = map_tree(lambda x: x.cpu(), batch.inputs)  # a training may have left the dataset on its card
    return [map_tree(lambda x: x[row], inputs) for row in range(len(batch))]  # noqa: B023


def as_image(inputs: Any) -> np.ndarray | None:
    """A sample's inputs as an image to look at, uint8 [H, W, 3] or [H, W]; None where they are no image.

    Takes arrays and tensors [C, H, W] or [H, W, C], or the first of these in a tuple or dict. Values that are not uint8
    are stretched to 0..255. Channels are averaged unless there are 1, 3 or 4.
    """
    if isinstance(inputs, (dict, tuple, list)):
        found = map(as_image, inputs.values() if isinstance(inputs, dict) else inputs)
        return next((image for image in found if image is not None), None)
    image = np.asarray(inputs)
    if image.ndim == 3 and not (image.shape[2] in (1, 3, 4) and image.shape[0] not in (1, 3, 4)):
        image = image.transpose(1, 2, 0)
    if image.ndim not in (2, 3) or min(image.shape[:2]) < 8:
        return None
    step = -(-max(image.shape[:2]) // WIDEST_IMAGE)
    image = image[::step, ::step]
    if image.ndim == 3:
        image = image[:, :, :3] if image.shape[2] in (3, 4) else image.mean(2).astype(image.dtype)
    if image.dtype != np.uint8:
        low, high = float(image.min()), float(image.max())
        image = ((image - low) / max(high - low, 1e-9) * 255).astype(np.uint8)
    return image


def confusion_matrix(confusion: np.ndarray, names: Sequence[str]) -> Any:
    """A figure of counts [C, C], true by found, coloured by their share of the true class."""
    count = len(names)
    side = 2.5 + 0.32 * count if count > 6 else 4.5
    figure, axes = subplots(side + 1.5, side)
    parts = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    shown = axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    words = [_short(name) for name in names]
    axes.set_xticks(range(count), words, rotation=90, fontsize=8)
    axes.set_yticks(range(count), words, fontsize=8)
    axes.set(xlabel="found", ylabel="true")
    for row, column in np.argwhere(confusion) if count <= 20 else ():
        colour = "white" if parts[row, column] > 0.5 else "black"
        axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(shown, shrink=0.6, label="part of the true class")
    return figure


def residual_plots(found: np.ndarray, truth: np.ndarray, names: Sequence[str]) -> Any:
    """A figure with a row of two plots for each column of [m, T]."""
    count = found.shape[1]
    figure, grid = subplots(9.5, 3.6 * count, count, 2, squeeze=False)
    for (left, right), f, t, name in zip(grid, found.T, truth.T, names, strict=False):
        left.hexbin(t, f, gridsize=60, bins="log", mincnt=1, cmap="viridis")
        ends = [min(t.min(), f.min()), max(t.max(), f.max())]
        left.plot(ends, ends, color="0.5", linewidth=1)
        left.set(xlabel=f"truth {_short(name)}", ylabel="prediction")
        right.hist(f - t, bins=60)
        right.axvline(0, color="0.5", linewidth=1)
        right.set(xlabel="prediction - truth", ylabel="rows")
        right.locator_params(axis="x", nbins=5)
    return figure
