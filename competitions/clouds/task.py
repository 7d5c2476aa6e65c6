"""Understanding Clouds from Satellite Images: segment Fish, Flower, Gravel and Sugar clouds.

The score is the mean Dice over images and classes, at 350x525.  make train COMP=clouds RECIPE=small
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.loading.folds import multilabel_stratified
from common.loading.mixing import CutMix
from common.metrics import Metric, dice
from common.raw import RawData
from common.task import TTA, Data, Network, Postprocess, Submission, Task
from common.vision import rle
from common.vision.backbones import probe
from common.vision.datasets import ImageDataset
from common.vision.store import ImageStore
from common.vision.tta import FLIPS, Flip
from common.vision.weights import start_encoder
from competitions.clouds import decision, loss, plots, reader, tuning
from competitions.clouds.augment import pipeline
from competitions.clouds.config import CloudConfig
from competitions.clouds.dataset import cloud_images
from competitions.clouds.model import CloudNet

SCRATCH = "--encoder-weights none --encoder-lr 1"


def build(config: CloudConfig, raw: RawData, log: Callable[[str], Any]) -> Task:
    """Read and check the files and build the Task; raises UserError for wrong settings or files."""
    if not (config.bce or config.dice or config.lovasz or config.present):
        raise UserError("all weights of the pixels' loss are 0: give --bce, --dice, --lovasz or --present one above 0")
    if not config.classes and config.class_head == "pooled":
        raise UserError("--classes 0 leaves the class head untrained: give it a weight, or --class-head topk")
    if raw.is_demo and config.encoder_weights == "imagenet":
        log("demo: the encoder starts from scratch (--encoder-weights none), as generated clouds need no ImageNet")
        config = replace(config, encoder_weights="none", encoder_lr=1.0)
    files = reader.read(raw, log)
    settings = {"size": config.size, "limit_gb": config.cache_gb, "upright": False, "announce": log}
    store = partial(ImageStore.beside, raw, **settings)
    images = store(files.train_paths)
    valid = cloud_images(images, files.runs)

    def tune(predictions: dict[str, Any], rows: Any) -> dict[str, Any]:
        return tuning.tune(predictions, lambda i: files.runs.masks(int(rows[i]), reader.SUBMISSION_SIZE), config.seed)

    def rows(ids: Sequence[str], masks: Tensor) -> Iterator[tuple[str, str]]:
        for image, of_classes in zip(ids, masks.cpu().numpy(), strict=True):
            for label, mask in zip(reader.CLASSES, of_classes, strict=True):
                yield f"{image}_{label}", rle.encode(mask)

    network = partial(
        CloudNet, config.architecture, config.encoder, config.class_head, config.dropout, config.decoder_width
    )
    flags = f"--architecture {config.architecture} --encoder {config.encoder}"
    pixels = reader.SUBMISSION_SIZE[0] * reader.SUBMISSION_SIZE[1]
    return Task(
        data=Data(
            train=cloud_images(images, files.runs, pipeline(config.augment, config.blackout)),
            valid=valid,
            ids=files.images,
            folds=multilabel_stratified(files.images, files.runs.present(), config.folds, config.seed),
            test=ImageDataset(store(files.test_paths)),
            test_ids=files.test_images,
            mix=CutMix(probability=config.cutmix) if config.cutmix else None,
        ),
        network=Network(
            model=network,
            loss=loss.build(config),
            tta=tuple(TTA(name, way.apply, partial(_undo, way)) for name, way in FLIPS.items()),
            lr_scales={"net.encoder.": config.encoder_lr},
            pretrain=lambda model: start_encoder(
                model.net.encoder, config.encoder, config.encoder_weights, scratch=SCRATCH
            ),
        ),
        postprocess=Postprocess(predict=decision.predict, apply=decision.apply, tune=tune, kept="uint8"),
        submission=Submission(rows=rows, valid=lambda values: rle.problem_of_text(values[0], pixels)),
        metrics=_metrics(),
        check=partial(probe, network, config.size, 3, flags),
        report=partial(plots.report, files, valid),
    )


def _undo(way: Flip, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
    return predictions | {"pixels": way.undo(predictions["pixels"])}


def _metrics() -> tuple[Metric, ...]:
    """The competition's score, then the same for every class."""

    def of(label: int) -> Callable[[Tensor, dict[str, Tensor]], tuple[Tensor, Tensor]]:
        return lambda masks, targets: (masks[:, label], targets["masks"][:, label])

    whole = dice().on(lambda masks, targets: (masks, targets["masks"]))
    return whole, *(dice().on(of(label), f"dice_{name.lower()}") for label, name in enumerate(reader.CLASSES))
