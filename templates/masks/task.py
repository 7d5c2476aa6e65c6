"""my_competition: which pixels of an image belong to the thing? The score is the Dice, the mean over the images.

CHANGE marks what to adapt to your competition; common/task.py lists everything that a Task can have.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import albumentations as A
import cv2
from torch import Tensor

from common import tables
from common.loading.folds import stratified
from common.losses import BCEDice
from common.metrics import dice
from common.raw import RawData
from common.submission import Sample
from common.task import TTA, Data, Network, Postprocess, Submission, Task
from common.vision import rle
from common.vision.backbones import MaskNet
from common.vision.datasets import ImageDataset
from common.vision.store import ImageStore
from common.vision.tta import MIRRORED
from common.vision.weights import start_encoder
from competitions.my_competition.config import MyConfig

ID, RUNS = "id", "rle"  # CHANGE: columns of train.csv
FULL = (96, 128)  # CHANGE: height and width of the masks in train.csv and in the submission


def build(config: MyConfig, raw: RawData, log: Callable[[str], Any]) -> Task:
    """Read the files and fill in the Task; raises UserError for anything wrong in them."""
    table = tables.read(raw, "train.csv", {ID: str, RUNS: tables.text(blank=True)}, id=ID)
    # CHANGE: for a row per thing, no id=ID, table = table.groupby(ID, sort=False)[RUNS].agg(" ".join).reset_index()
    ids = table[ID].tolist()
    # CHANGE: the image folders; an id is a file's name, with or without its extension.
    stored = partial(ImageStore.of, raw, size=config.size, limit_gb=config.cache_gb, upright=False, announce=log)
    train, test = stored("train", ids, "train.csv"), stored("test", Sample.read(raw).ids, "sample_submission.csv")
    # CHANGE: for K masks per image, pass cells [n][K] here, and MaskNet K outputs. For masks in PNG files, of 0 and 255
    # or of 0 and 1: masks = stored("masks", ids, "train.csv", gray=True), and of_mask=binary below beside masks=masks,
    # with binary from common.vision.datasets.
    masks = rle.RunMasks(table[[RUNS]].to_numpy(), FULL, config.size, ids, f"{raw.path}/train.csv")
    # CHANGE: augmentations of images and their masks. Their random numbers are keyed by seed, epoch and row.
    augment = A.Compose(
        [A.HorizontalFlip(), A.Affine(scale=(0.8, 1.2), rotate=(-15, 15)), A.RandomBrightnessContrast()]
    )

    def rows(names: Sequence[str], decided: Tensor) -> Iterator[tuple[str, str]]:
        for name, mask in zip(names, decided[:, 0].float().numpy(), strict=True):
            yield name, rle.encode(cv2.resize(mask, FULL[::-1]) > 0.5)

    return Task(
        data=Data(
            train=ImageDataset(train, masks=masks, transform=augment),
            valid=ImageDataset(train, masks=masks),
            test=ImageDataset(test),
            ids=ids,
            # CHANGE: if images are alike, grouped(table["place"], config.folds, config.seed) from the same module
            folds=stratified(ids, table[RUNS] == "", config.folds, config.seed),
            # --pseudo RUN trains on the test rows too, with predictions [m, K, H, W] as their masks
            pseudo=lambda soft: ImageDataset(test, masks=soft.permute(0, 2, 3, 1).numpy(), transform=augment),
        ),
        network=Network(
            model=partial(MaskNet, "unet", config.encoder, 1),
            loss=BCEDice(),
            tta=tuple(TTA(name, way.apply, way.undo) for name, way in MIRRORED.items()),
            pretrain=lambda model: start_encoder(model.net.encoder, config.encoder, config.encoder_weights),
        ),
        postprocess=Postprocess(
            predict=lambda outputs: outputs.sigmoid(),  # averaged over TTA, folds and runs
            apply=lambda probabilities, tuned: probabilities > config.threshold,
            kept="uint8",
        ),
        submission=Submission(rows=rows, valid=lambda cells: rle.problem_of_text(cells[0], FULL[0] * FULL[1])),
        # CHANGE: from common.metrics, or your own Metric; the first one is the score. It is computed at --size
        metrics=(dice(),),
    )
