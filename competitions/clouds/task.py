"""Understanding Clouds from Satellite Images: where on an image are Fish, Flower, Gravel and Sugar clouds?

The score is the mean Dice over images and classes, at 350x525.  make train COMP=clouds RECIPE=small
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.config import Config, at_least, between, flag
from common.errors import UserError
from common.kaggle.source import Source
from common.raw import RawData

if TYPE_CHECKING:  # needs torch, and --help does not
    from common.task import Metric, Task
    from common.vision.datasets import ImageDataset
    from competitions.clouds.reader import CloudFiles

SOURCE = Source(
    slug="understanding_cloud_organization",
    expected=("train.csv", "sample_submission.csv", "train_images/*.jpg", "test_images/*.jpg"),
    higher_is_better=True,
    labels=("train.csv", "sample_submission.csv"),
    notes="6 GB: 5,546 training and 3,698 test images of 1400x2100",
)
Architecture = Literal[
    "unet", "unetplusplus", "fpn", "linknet", "manet", "pan", "pspnet", "deeplabv3plus", "upernet", "segformer"
]


@dataclass(frozen=True)
class CloudConfig(Config):
    """The settings of clouds: the network, the size it works at, the augmentation and the parts of the loss."""

    size: tuple[int, int] = flag(
        (384, 576), "height and width the network works at, up to 1400,2100", "pixels", at_least(64)
    )
    architecture: Architecture = flag("unet", "decoder of segmentation-models-pytorch")
    encoder: str = flag("resnet34", "encoder of segmentation-models-pytorch, or tu- and a timm name")
    encoder_weights: str = flag("imagenet", "where the encoder starts: imagenet, none, or a file or folder of weights")
    encoder_lr: float = flag(0.3, "learning rate of the encoder", "times lr", at_least(0))
    class_head: Literal["pooled", "topk"] = flag(
        "pooled", "presence of a class from the deepest features, or from its ten likeliest pixels"
    )
    dropout: float = flag(
        0.2, "part of the deepest features that the class head does without in training", rule=between(0, 1)
    )
    augment: Literal["none", "light", "strong"] = flag("light", "changes of the training images")
    blackout: float = flag(0.1, "part of the training images that lose a class", "fraction", between(0, 1))
    cutmix: float = flag(
        0.0, "part of the pairs of training images in which a box of the other is pasted", "fraction", between(0, 1)
    )
    bce: float = flag(1.0, "weight of the pixels' cross-entropy", rule=at_least(0))
    dice: float = flag(1.0, "weight of the Dice loss over the batch", rule=at_least(0))
    lovasz: float = flag(0.0, "weight of the Lovasz hinge over the batch", rule=at_least(0))
    present: float = flag(0.0, "weight of .75 BCE + .25 Dice per image, on the classes an image has", rule=at_least(0))
    classes: float = flag(0.5, "weight of the class head's cross-entropy", rule=at_least(0))


DEFAULT = CloudConfig(epochs=20, batch_size=8, lr=1e-3, weight_decay=1e-2, ema=0.99, keep="last")
SMALL = replace(
    DEFAULT,
    fold="all",
    folds=4,
    epochs=52,
    size=(160, 240),
    architecture="fpn",
    encoder="resnet18",
    encoder_weights="none",
    encoder_lr=1.0,
    augment="strong",
    cutmix=0.5,
    ema=0.995,
    channels_last=True,
    evaluate_every=26,
)
FULL = replace(
    DEFAULT,
    epochs=15,
    batch_size=16,
    size=(1400, 2100),
    encoder="efficientnet-b3",
    micro_batch=1,  # "auto" starts with all sixteen: a CPU's memory is not refused, the process is killed
    checkpointing=True,
    keep_memory=False,
    lr=5e-4,
    clip_norm=1.0,
)
BEST = replace(
    DEFAULT,
    fold="all",
    epochs=25,
    size=(576, 864),
    encoder="efficientnet-b5",
    augment="strong",
    lr=5e-4,
    ema=0.998,
    checkpointing=True,
    clip_norm=1.0,
)
RECIPES: dict[str, CloudConfig] = {
    # make train COMP=clouds: a card with 8 GB, some hours
    "default": DEFAULT,
    # make train COMP=clouds RECIPE=small: a laptop's CPU, 500 images
    "small": SMALL,
    # make train COMP=clouds RECIPE=full: every pixel, on a card with 11 GB
    "full": FULL,
    # make train COMP=clouds RECIPE=best: five folds of a larger encoder, a day on one card
    "best": BEST,
    # make train COMP=clouds RECIPE=smoke: seconds on the demo data, to see that everything works
    "smoke": replace(
        SMALL, fold="0", folds=3, epochs=1, size=(64, 96), augment="light", precision="fp32", channels_last=False
    ),
}


def write_demo(folder: Path) -> None:
    """A handful of generated cloud images in the competition's files."""
    from competitions.clouds import demo

    demo.write(folder)


def build(config: CloudConfig, raw: RawData) -> Task:
    """Read and check the files, and put the competition together; raises UserError for what is wrong with either."""
    from common.loading.folds import multilabel_stratified
    from common.loading.mixing import CutMix
    from common.task import Task, View
    from common.vision.tta import FLIPS
    from competitions.clouds import decision, loss, plots, reader, rle, tuning
    from competitions.clouds.augment import pipeline
    from competitions.clouds.dataset import cloud_images

    _check(config)
    announce = print if os.environ.get("RANK", "0") == "0" else lambda message: None
    if raw.is_demo and config.encoder_weights == "imagenet":
        announce("demo: the encoder starts from scratch (--encoder-weights none), generated clouds need no ImageNet")
        config = replace(config, encoder_weights="none", encoder_lr=1.0)
    files = reader.read(raw, announce)
    plain = cloud_images(files.train_paths, config.size, files.runs)
    test = cloud_images(files.test_paths, config.size)

    def learn(predictions: Any, rows: Any) -> dict[str, Any]:
        return tuning.learn(predictions, lambda i: files.runs.masks(int(rows[i]), reader.SUBMISSION_SIZE), config.seed)

    def rows(ids: Sequence[str], masks: Any) -> Iterator[tuple[str, str]]:
        for image, of_classes in zip(ids, masks.cpu().numpy(), strict=True):
            for label in files.test_classes[image]:
                yield f"{image}_{reader.CLASSES[label]}", rle.encode(of_classes[label])

    return Task(
        labelled=cloud_images(files.train_paths, config.size, files.runs, pipeline(config.augment, config.blackout)),
        plain=plain,
        test=test,
        ids=files.images,
        test_ids=files.test_images,
        folds=multilabel_stratified(files.images, files.runs.present(), config.folds, config.seed),
        model=partial(_model, config),
        loss=loss.build(config),
        metrics=_metrics(reader.CLASSES),
        predict=decision.predict,
        decide=decision.decide,
        columns=reader.COLUMNS,
        rows=rows,
        sample_submission=lambda: raw.text("sample_submission.csv").splitlines(),
        valid=lambda values: rle.problem_of_text(values[0], reader.SUBMISSION_SIZE[0] * reader.SUBMISSION_SIZE[1]),
        learn=learn,
        preflight=partial(_preflight, config, test),
        pretrain=partial(_pretrain, config) if config.encoder_weights != "none" else None,
        mix=CutMix(probability=config.cutmix) if config.cutmix else None,
        views=tuple(View(name, way.apply, partial(decision.unflip, way)) for name, way in FLIPS.items()),
        lr_scales={"net.encoder.": config.encoder_lr},
        fingerprint=_fingerprint(raw, files),
        paths=[*files.train_paths, *files.test_paths],
        prediction_type="uint8",
        report=lambda run: plots.report(run, files, plain),
    )


def _check(config: CloudConfig) -> None:
    if not (config.bce or config.dice or config.lovasz or config.present):
        raise UserError("all weights of the pixels' loss are 0: give --bce, --dice, --lovasz or --present one above 0")


def _model(config: CloudConfig) -> Any:
    from competitions.clouds.model import CloudNet

    return CloudNet(config.architecture, config.encoder, config.class_head, config.dropout)


def _preflight(config: CloudConfig, test: ImageDataset) -> None:
    from common.vision.backbones import probe
    from common.vision.check import refuse_unreadable

    flags = f"--architecture {config.architecture} --encoder {config.encoder}"
    probe(partial(_model, config), config.size, 3, flags)
    refuse_unreadable(test.unreadable(), len(test), "test images")


def _pretrain(config: CloudConfig, network: Any) -> None:
    from common.vision.weights import start_encoder

    scratch = "--encoder-weights none --encoder-lr 1"
    start_encoder(network.net.encoder, config.encoder, config.encoder_weights, scratch=scratch)


def _metrics(names: Iterable[str]) -> tuple[Metric, ...]:
    """The competition's score, then the same of every class."""
    from common.task import Metric
    from competitions.clouds.decision import dice

    def stats(label: int | None) -> Callable[[Any, Any], Any]:
        return lambda masks, targets: dice(masks, targets["masks"])[:, slice(None) if label is None else label]

    whole = Metric("dice", stats(None), lambda sums, count: float(sums.mean()) / count)
    return whole, *(Metric(f"dice_{name.lower()}", stats(label)) for label, name in enumerate(names))


def _fingerprint(raw: RawData, files: CloudFiles) -> str:
    """sha256 over the tables, and over names and sizes of the training images: reading 6 GB would take a minute.

    Not of the test images: a run in which one of them was mended since is still the same training.
    """
    from common.vision.find import fingerprint

    tables = raw.fingerprint("train.csv", "sample_submission.csv")
    return hashlib.sha256(f"{tables} {fingerprint(files.train_paths)}".encode()).hexdigest()
