"""Human Protein Atlas: predict in which of 28 parts of the cell a protein is; the score is the macro F1.

make train COMP=protein_atlas
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from common import tables, thresholds
from common.errors import UserError
from common.loading import orders
from common.loading.folds import multilabel_stratified
from common.losses import BCE, Focal, LovaszHinge, SoftFBeta, Weighted
from common.metrics import f_beta
from common.raw import RawData
from common.task import TTA, Data, Network, Postprocess, Submission, Task
from common.vision.backbones import Classifier, probe
from common.vision.datasets import ImageDataset
from common.vision.find import channels_of
from common.vision.store import ImageStore
from common.vision.tta import TURNS
from common.vision.weights import start_backbone
from competitions.protein_atlas import plots
from competitions.protein_atlas.config import ProteinConfig

COLOURS = ("red", "green", "blue", "yellow")
LABELS = 28
NUMBERS = frozenset(map(str, range(LABELS)))
CHOICES: dict[str, thresholds.Choose] = {
    "best": thresholds.best_f_beta,
    "matching": lambda scores, truth: thresholds.matching(scores, truth.mean(0)),
    "half": lambda scores, truth: np.full(LABELS, thresholds.UNKNOWN),
}


def build(config: ProteinConfig, raw: RawData, log: Callable[[str], Any]) -> Task:
    """Read and check the files and build the Task; raises UserError for wrong settings or files."""
    if config.size[0] != config.size[1]:
        raise UserError(f"--size {config.size[0]},{config.size[1]}: expected a square, as images are rotated")
    if config.alternate and config.then == "none":
        raise UserError("--alternate true --then none: expected a second loss to take turns with, such as --then bce")
    ids, labels, paths = _train(raw)
    store = partial(ImageStore.beside, raw, size=config.size, limit_gb=config.cache_gb, announce=log)
    train, test = store(paths), store(_test(raw))
    targets, there = torch.from_numpy(labels).float(), np.flatnonzero(labels.any(0)).tolist()
    metric = f_beta(1, "macro").on(lambda found, truth: (found[:, there], truth[:, there]))
    weights = orders.by_rarity(labels) if config.sampling == "weighted" else None
    network = partial(Classifier, config.backbone, config.size, LABELS, 4, config.dropout, config.yellow)
    losses, choose = _losses(config), CHOICES[config.thresholds]

    def tune(scores: np.ndarray, rows: np.ndarray) -> dict[str, Any]:
        return {"thresholds": choose(scores, labels[rows]).tolist()}

    def apply(scores: Tensor, tuned: dict[str, Any]) -> Tensor:
        return thresholds.decide(scores, tuned.get("thresholds", [thresholds.UNKNOWN] * LABELS))

    return Task(
        data=Data(
            train=ImageDataset(train, targets, transform=_augmentation(config.augment)),
            valid=ImageDataset(train, targets),
            ids=ids,
            folds=multilabel_stratified(ids, labels, config.folds, config.seed),
            test=ImageDataset(test),
            order=None if weights is None else lambda own: orders.weighted(weights[own], rows=own),
            pseudo=lambda scores: ImageDataset(test, scores, transform=_augmentation(config.augment)),
        ),
        network=Network(
            model=network,
            loss=losses[0],
            loss_of=lambda epoch: losses[epoch],
            tta=tuple(TTA(name, way.apply) for name, way in TURNS.items()),
            pretrain=lambda model: start_backbone(
                model.backbone, config.backbone, config.encoder_weights, extra=config.yellow
            ),
        ),
        postprocess=Postprocess(predict=torch.sigmoid, apply=apply, tune=tune),
        submission=Submission(rows=_rows, valid=_fault, text=("Predicted",)),
        metrics=(metric,),
        check=partial(probe, network, config.size, 4, f"--backbone {config.backbone}"),
        names=plots.NAMES,
        report=partial(plots.report, train, ids, labels, apply),
    )


def _train(raw: RawData) -> tuple[list[str], np.ndarray, list[tuple[Path, ...]]]:
    """Ids, labels uint8 [n, 28] and the four files of every image."""
    table = tables.read(raw, "train.csv", {"Id": str, "Target": str}, id="Id", others="drop", lines=True)
    labels = np.zeros((len(table), LABELS), np.uint8)
    for row, (line, _, cell) in enumerate(table.itertuples()):
        if problem := _fault([cell]):
            raise UserError(f"{raw.path}/train.csv line {line}: Target {cell!r}: {problem}: {raw.mend}")
        labels[row, [int(label) for label in cell.split()]] = 1
    return table["Id"].tolist(), labels, _files(raw, "train", table, "train.csv")


def _test(raw: RawData) -> list[tuple[Path, ...]]:
    name = "sample_submission.csv"
    return _files(raw, "test", tables.read(raw.uncounted(), name, {"Id": str}, id="Id", lines=True), name)


def _files(raw: RawData, folder: str, table: pd.DataFrame, name: str) -> list[tuple[Path, ...]]:
    return channels_of(raw, folder, table["Id"].tolist(), COLOURS, name, table.index.tolist())


def _fault(values: Sequence[str]) -> str | None:
    """The fault in the labels of a row of train.csv or of a submission, or None."""
    labels = values[0].split()
    if unknown := [label for label in labels if label not in NUMBERS]:
        return f"label {unknown[0][:20]}, expected whole numbers from 0 to {LABELS - 1} with spaces between"
    if not labels:
        return f"no label, expected at least one of 0 to {LABELS - 1}"
    return "a label appears twice" if len(set(labels)) < len(labels) else None


def _rows(ids: Sequence[str], found: Tensor) -> Iterator[tuple[str, str]]:
    for name, labels in zip(ids, found.cpu().numpy(), strict=True):
        yield name, " ".join(map(str, np.flatnonzero(labels)))


def _augmentation(strength: str) -> A.Compose | None:
    """The augmentation: none, light (the eight symmetries of a square) or strong (also rotation, scale, brightness)."""
    turns, mirror = A.D4(p=1), cv2.BORDER_REFLECT_101
    place = A.Affine(scale=(0.8, 1.25), rotate=(-45, 45), border_mode=mirror, p=0.7)
    light = A.RandomBrightnessContrast(0.2, 0.2, p=0.5)
    return {"none": None, "light": A.Compose([turns]), "strong": A.Compose([turns, place, light])}[strength]


def _losses(config: ProteinConfig) -> list[Any]:
    """The loss of every epoch."""
    macro, samples = SoftFBeta(average="macro"), SoftFBeta(average="samples")
    known = {
        "bce": BCE(),
        "focal": Focal(),
        "soft_f1": macro,
        "soft_f1_samples": samples,
        "soft_f1_both": Weighted((macro, 0.5), (samples, 0.5)),
        "focal+soft_f1": Weighted((Focal(), 10.0), (macro, 1.0)),
        "lovasz": LovaszHinge(),
    }
    first = config.epochs if config.then == "none" else round(config.then_from * config.epochs)
    turns = (config.then, config.loss) if config.alternate else (config.then,)
    return [
        known[config.loss if epoch < first else turns[(epoch - first) % len(turns)]] for epoch in range(config.epochs)
    ]
