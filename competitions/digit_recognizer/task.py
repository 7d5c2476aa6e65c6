"""Digit Recognizer: classify 28x28 images into ten digits; the score is the accuracy."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from common.loading.folds import stratified
from common.losses import CrossEntropy
from common.metrics import accuracy
from common.raw import RawData
from common.task import TTA, Data, Network, Postprocess, Submission, Task
from competitions.digit_recognizer.augment import Strength, transformed
from competitions.digit_recognizer.config import DigitConfig
from competitions.digit_recognizer.dataset import Digits
from competitions.digit_recognizer.model import DigitNet
from competitions.digit_recognizer.reader import read

DIGITS = tuple("0123456789")
AUGMENTATIONS = (
    TTA("as is"),
    TTA("turned left", lambda images: transformed(images, rotation=8.0)),
    TTA("turned right", lambda images: transformed(images, rotation=-8.0)),
    TTA("smaller", lambda images: transformed(images, scale=0.92)),
    TTA("larger", lambda images: transformed(images, scale=1.08)),
    TTA("up", lambda images: images.roll(-1, 2)),  # the row that wraps round is black in 99 of 100 images
    TTA("down", lambda images: images.roll(1, 2)),
    TTA("left", lambda images: images.roll(-1, 3)),
    TTA("right", lambda images: images.roll(1, 3)),
)


def build(config: DigitConfig, raw: RawData, log: Callable[[str], Any]) -> Task:
    """Read the files and build the Task; raises UserError for any fault in the files."""
    files = read(raw)
    images, labels = torch.from_numpy(files.images), torch.from_numpy(files.labels)
    test_images = torch.from_numpy(files.test_images)
    strength = Strength(config.rotation, config.scale, config.shear, config.shift, config.elastic)
    ids = [str(row) for row in range(len(labels))]
    return Task(
        data=Data(
            train=Digits(images, labels, strength),
            valid=Digits(images, labels),
            ids=ids,
            folds=stratified(ids, files.labels, config.folds, config.seed),
            test=Digits(test_images),
            test_ids=[str(number) for number in range(1, len(test_images) + 1)],
            pseudo=lambda probabilities: Digits(test_images, probabilities, strength),
        ),
        network=Network(
            model=lambda: DigitNet(config.width, config.kernel, config.dropout),
            loss=CrossEntropy(ignore_index=None),
            tta=AUGMENTATIONS,
        ),
        postprocess=Postprocess(
            predict=lambda outputs: outputs.softmax(1),  # [B, 10]
            apply=lambda probabilities, tuned: probabilities.argmax(1),
        ),
        submission=Submission(valid=_fault),
        metrics=(accuracy(),),
    )


def _fault(values: Sequence[str]) -> str | None:
    """What is wrong with the Label of a submission's row."""
    return None if values[0] in DIGITS else f"label {values[0]}, expected one digit, 0 to 9"
