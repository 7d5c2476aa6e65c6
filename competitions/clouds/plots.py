"""The clouds part of a run's report: predicted masks beside the true ones, and how thresholds change the score."""

from dataclasses import replace
from functools import partial
from typing import Any

import cv2
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from common.predictions import part_of, read_predictions, row_numbers, unpack
from common.report import Report, subplots, without_frame
from common.run import Run
from common.vision.datasets import ImageDataset
from competitions.clouds import decision, tuning
from competitions.clouds.reader import CLASSES, SUBMISSION_SIZE, CloudFiles

COLOURS = {"Fish": "#e63c3c", "Flower": "#3cc850", "Gravel": "#4682ff", "Sugar": "#fad228"}
OVERLAYS = 8  # images in the report, from the best to the worst
CURVE_IMAGES = 150  # images used for the threshold curves


def report(files: CloudFiles, images: ImageDataset, run: Run, page: Report) -> None:
    """Add the out-of-fold predictions beside the truth, and the threshold curves, to the run's report."""
    predictions = read_predictions(run.path, "oof")
    if predictions is None:
        return
    rows = row_numbers(run.path, "oof", files.images).tolist()
    tuned = run.result["tuned"]
    truth = [partial(files.runs.masks, row, SUBMISSION_SIZE) for row in rows]
    scores = np.array([decision.dice(decided(predictions, at, tuned), truth[at]()) for at in range(len(rows))])

    page.text(
        f"{len(rows)} images that the network was not trained on. The rules were tuned on these images. 'Held out' "
        f"is the Dice of each fifth of them with rules tuned on the other four."
    )
    page.table(["rules", "held out"], tuned["held_out"].items())
    stages = ", ".join(f"{stage} {value:.4f}" for stage, value in tuned["held_out"].items())
    run.log(f"Dice of rules tuned on some images and scored on the others: {stages}")
    present = files.runs.present()[rows].mean(0)
    facts = [
        (name, float(scores[:, label].mean()), float(present[label]), *tuned["rules"][name].values())
        for label, name in enumerate(CLASSES)
    ]
    page.table(["class", "Dice", "share of images", *tuned["rules"][CLASSES[0]]], facts)
    page.figure(class_scores(scores, present), "dice", "Dice of each class, and the score of leaving every mask empty")
    some = np.linspace(0, len(rows) - 1, min(CURVE_IMAGES, len(rows))).astype(int)
    tables = tuning.tables(part_of(predictions, some), lambda at: truth[some[at]](), tuned["presence"])
    page.figure(
        threshold_curves(tables, tuned),
        "thresholds",
        f"Dice of {len(some)} images against each threshold, dotted: the tuned one",
    )

    order = np.argsort(-scores.mean(1), kind="stable")
    for place, at in enumerate(order[np.linspace(0, len(order) - 1, min(OVERLAYS, len(order))).astype(int)]):
        row = rows[at]
        image = images[row][0].permute(1, 2, 0).numpy()
        figure = overlay(image, truth[at](), decided(predictions, at, tuned))
        words = ", ".join(f"{name} {value:.2f}" for name, value in zip(CLASSES, scores[at], strict=True))
        page.figure(figure, f"overlay-{place + 1}", f"{files.images[row]}: Dice {scores[at].mean():.3f} ({words})")


def decided(kept: dict[str, np.ndarray], at: int, tuned: dict[str, Any]) -> np.ndarray:
    """Masks bool [4, 350, 525] from the stored predictions of one image."""
    return decision.apply(unpack(part_of(kept, slice(at, at + 1))), tuned)[0].numpy().astype(bool)


def overlay(image: np.ndarray, truth: np.ndarray, found: np.ndarray) -> Figure:
    """The image uint8 [H, W, 3] twice, under the true masks and under the predicted ones."""
    image = cv2.resize(image, SUBMISSION_SIZE[::-1], interpolation=cv2.INTER_AREA)
    figure, grid = subplots(13, 4.8, 1, 2)
    for axes, title, masks in zip(grid, ("truth", "found"), (truth, found), strict=True):
        axes.imshow(painted(image, masks))
        axes.set_title(title)
        without_frame(axes)
    handles = [grid[0].plot([], [], color=COLOURS[name], linewidth=6)[0] for name in CLASSES]
    figure.legend(handles, CLASSES, loc="outside lower center", ncols=len(CLASSES), frameon=False)
    return figure


def painted(image: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The image uint8 [H, W, 3] with every mask as a tint and an outline."""
    result = image.astype(np.float32)
    for name, mask in zip(CLASSES, masks, strict=True):
        colour = 255 * np.array(to_rgb(COLOURS[name]), np.float32)
        inner = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8), borderValue=0).astype(bool)
        result[mask] = 0.72 * result[mask] + 0.28 * colour
        result[mask & ~inner] = colour
    return result.astype(np.uint8)


def class_scores(scores: np.ndarray, present: np.ndarray) -> Figure:
    """Bars of the mean Dice of `scores` [m, 4] per class; `present` [4] is the fraction of images with the class."""
    figure, axes = subplots(7, 3.6)
    axes.bar(CLASSES, scores.mean(0), color=[COLOURS[name] for name in CLASSES], width=0.6, label="this run")
    axes.bar(CLASSES, 1 - present, width=0.6, fill=False, edgecolor="black", linestyle="--", label="all empty")
    axes.set_ylabel("Dice")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(frameon=False)
    return figure


def threshold_curves(tables: list[tuning.Table], tuned: dict[str, Any]) -> Figure:
    """Mean Dice as a function of one threshold of the tuned rules, the others fixed."""
    parts = {
        "gate": (tuning.GATES, "gate"),
        "top": (tuning.LEVELS, "pixel threshold"),
        "size": (tuning.SIZES, "smallest region, pixels"),
    }
    figure, plots = subplots(13, 3.6, 1, len(parts))
    for axes, (part, (grid, words)) in zip(plots, parts.items(), strict=True):
        for name, table in zip(CLASSES, tables, strict=True):
            kept = decision.Rule(**tuned["rules"][name] | {"hull": False})
            rules = [replace(kept, **{part: value}) for value in grid]
            rules = [replace(rule, bottom=min(rule.bottom, rule.top)) for rule in rules]
            axes.plot(grid, [tuning.dice_of(table, rule).mean() for rule in rules], color=COLOURS[name], label=name)
            axes.axvline(getattr(kept, part), color=COLOURS[name], linestyle=":", linewidth=1)
        axes.set_xlabel(words)
        axes.grid(alpha=0.3)
    plots[0].set_ylabel("Dice")
    plots[0].legend(frameon=False)
    return figure
