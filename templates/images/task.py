"""my_competition: images and their labels in a CSV; the score is the ROC AUC, the mean over the labels.

CHANGE marks what to adapt to your competition; common/task.py lists everything that a Task can have.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import albumentations as A
import numpy as np

from common import tables
from common.loading.folds import multilabel_stratified
from common.losses import BCE
from common.metrics import roc_auc
from common.raw import RawData
from common.submission import Sample
from common.task import TTA, Data, Network, Postprocess, Task
from common.vision.backbones import Classifier
from common.vision.datasets import ImageDataset
from common.vision.store import ImageStore
from common.vision.tta import MIRRORED
from common.vision.weights import start_backbone
from competitions.my_competition.config import MyConfig

ID, LABELS = "id", ("ring",)  # CHANGE: columns of train.csv; the labels 0 or 1, in the sample submission's order


def build(config: MyConfig, raw: RawData, log: Callable[[str], Any]) -> Task:
    """Read the files and fill in the Task; raises UserError for anything wrong in them."""
    columns = {ID: str} | dict.fromkeys(LABELS, tables.number(0, 1))
    table = tables.read(raw, "train.csv", columns, id=ID)
    targets = table[list(LABELS)].to_numpy(np.float32)  # [n, labels]
    # CHANGE: the image folders; an id is a file's name, with or without its extension.
    stored = partial(ImageStore.of, raw, size=config.size, limit_gb=config.cache_gb, announce=log)
    train, test = stored("train", table[ID], "train.csv"), stored("test", Sample.read(raw).ids, "sample_submission.csv")
    # CHANGE: augmentations that keep the label. Their random numbers are keyed by seed, epoch and row.
    augment = A.Compose(
        [A.HorizontalFlip(), A.Affine(scale=(0.8, 1.2), rotate=(-15, 15)), A.RandomBrightnessContrast()]
    )
    return Task(
        data=Data(
            train=ImageDataset(train, targets, transform=augment),
            valid=ImageDataset(train, targets),
            test=ImageDataset(test),
            ids=table[ID].tolist(),
            # CHANGE: if images belong together, grouped(table["site"], config.folds, config.seed) from the same module
            folds=multilabel_stratified(table[ID].tolist(), targets, config.folds, config.seed),
            # --pseudo RUN trains on the test rows too, with predictions [m, labels] as their targets
            pseudo=lambda soft: ImageDataset(test, soft, transform=augment),
        ),
        network=Network(
            model=partial(Classifier, config.backbone, config.size, len(LABELS), dropout=config.dropout),
            # CHANGE: for one of C classes, targets are class numbers int64 [n] from a column tables.whole(0, C - 1),
            # the model has C outputs, the loss is CrossEntropy(), and `predict` below gives outputs.softmax(1). If the
            # CSV wants class numbers, add apply=lambda predictions, tuned: predictions.argmax(1) beside it.
            # CHANGE: for numbers, model=lambda: nn.Sequential(Classifier(...), ToUnits(targets)), the loss MSE(),
            # model[0].backbone in `pretrain` and no `predict` below; ToUnits is in common.tables.numbers.
            loss=BCE(),
            tta=tuple(TTA(name, way.apply) for name, way in MIRRORED.items()),
            pretrain=lambda model: start_backbone(model.backbone, config.backbone, config.encoder_weights),
        ),
        # Outputs -> predictions, which are averaged over TTA, folds and runs. CHANGE: if the CSV wants decisions (a
        # class, 0 or 1), `apply` makes them from predictions, and `tune` finds thresholds on out-of-fold predictions;
        # until then `tuned` is {}: apply=lambda predictions, tuned: predictions > tuned.get("threshold", 0.5)
        postprocess=Postprocess(predict=lambda outputs: outputs.sigmoid()),
        metrics=(roc_auc(),),  # CHANGE: from common.metrics, or your own Metric; the first one is the score
        names=LABELS,  # for the report; CHANGE: for one of C classes, their C names
    )
