"""Digit Recognizer: which of the ten digits a 28x28 image shows; the score is the accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import Config, at_least, between, flag
from common.kaggle.source import Source
from common.raw import RawData

if TYPE_CHECKING:  # needs torch, and --help does not
    from common.task import Task

DIGITS = tuple("0123456789")
SOURCE = Source(
    slug="digit-recognizer",
    expected=("train.csv", "test.csv", "sample_submission.csv"),
    higher_is_better=True,
    labels=("train.csv",),
)


@dataclass(frozen=True)
class DigitConfig(Config):
    """The settings of Digit Recognizer: the network's size and how far the training images are changed."""

    width: int = flag(32, "channels of the first scale; the others have 2 and 4 times as many", "channels", at_least(1))
    kernel: int = flag(5, "side of the larger convolutions", "pixels", (lambda side: side % 2 == 1, "an odd number"))
    dropout: float = flag(0.0, "part of the last features that is left out in training", rule=between(0, 1))
    rotation: float = flag(12.0, "largest turn of a training image", "degrees", at_least(0))
    scale: float = flag(0.12, "largest change of width and of height", "log of the factor", at_least(0))
    shear: float = flag(0.12, "largest slant", "pixels per pixel of height", at_least(0))
    shift: float = flag(2.0, "largest shift to each side", "pixels", at_least(0))
    elastic: float = flag(0.8, "standard deviation of the elastic bending", "pixels", at_least(0))


# How many times the machines of the README's figures need; every line gives its command and what came out of it.
RECIPES = {
    # make train COMP=digit_recognizer
    "default": DigitConfig(
        folds=8,
        epochs=20,
        batch_size=128,
        lr=3e-3,
        warmup=0.2,
        schedule="linear",
        ema=0.998,
        keep="last",
        evaluate_every=4,
        channels_last=True,
        workers=0,
    )
}
# make train COMP=digit_recognizer RECIPE=fast
RECIPES["fast"] = replace(
    RECIPES["default"],
    width=16,
    epochs=2,
    batch_size=64,
    ema=0.99,
    views=False,
    rotation=8.0,
    scale=0.08,
    shear=0.08,
    shift=1.0,
    elastic=0.4,
)
# make train COMP=digit_recognizer RECIPE=best
RECIPES["best"] = replace(RECIPES["default"], fold="all")
# seconds on the demo data, for tests
RECIPES["smoke"] = replace(RECIPES["default"], width=8, epochs=2, folds=5, precision="fp32", evaluate_every=1, ema=0.9)


def write_demo(folder: Path) -> None:
    """scikit-learn's small digits in the competition's files; see demo.py."""
    from competitions.digit_recognizer.demo import write_demo as write

    write(folder)


def build(config: DigitConfig, raw: RawData) -> "Task":
    """Read the files and fill in the Task; raises UserError for anything wrong in them."""
    import torch

    from common.loading.folds import stratified
    from common.losses import CrossEntropy
    from common.task import Metric, Task, View
    from competitions.digit_recognizer.augment import Strength, view
    from competitions.digit_recognizer.dataset import Digits
    from competitions.digit_recognizer.model import DigitNet
    from competitions.digit_recognizer.reader import read

    files = read(raw)
    images, labels = torch.from_numpy(files.images), torch.from_numpy(files.labels)
    strength = Strength(config.rotation, config.scale, config.shear, config.shift, config.elastic)
    ids = [str(row) for row in range(len(labels))]
    return Task(
        labelled=Digits(images, labels, strength),
        plain=Digits(images, labels),
        test=Digits(torch.from_numpy(files.test_images)),
        ids=ids,
        test_ids=files.test_ids,
        folds=stratified(ids, files.labels, config.folds, config.seed),
        model=lambda: DigitNet(config.width, config.kernel, config.dropout),
        loss=CrossEntropy(ignore_index=None),
        metrics=(Metric("accuracy", lambda decisions, targets: (decisions == targets).float()),),
        predict=lambda outputs: outputs.softmax(1),  # [B, 10]
        decide=lambda probabilities, learnt: probabilities.argmax(1),
        views=(
            View("as is"),
            View("turned left", lambda images: view(images, rotation=8.0)),
            View("turned right", lambda images: view(images, rotation=-8.0)),
            View("smaller", lambda images: view(images, scale=0.92)),
            View("larger", lambda images: view(images, scale=1.08)),
            View("up", lambda images: images.roll(-1, 2)),  # what re-enters is black in 99 of 100 images
            View("down", lambda images: images.roll(1, 2)),
            View("left", lambda images: images.roll(-1, 3)),
            View("right", lambda images: images.roll(1, 3)),
        ),
        columns=("ImageId", "Label"),
        rows=lambda ids, decisions: zip(ids, decisions.tolist(), strict=True),
        sample_submission=lambda: files.sample_lines,
        valid=_fault,
        fingerprint=files.fingerprint,
    )


def _fault(values: Sequence[str]) -> str | None:
    """What is wrong with the Label of a submission's row."""
    return None if values[0] in DIGITS else f"label {values[0]}, expected one digit, 0 to 9"
