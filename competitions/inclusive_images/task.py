"""Inclusive Images: which of 7,178 labels does a photograph have? The score is the mean F2 of the images.

make train COMP=inclusive_images RECIPE=small
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.config import Config, at_least, between, flag
from common.errors import UserError
from common.kaggle.source import Images, Source
from common.raw import RawData

if TYPE_CHECKING:  # needs torch, and --help does not
    from common.run import Run
    from common.task import Metric, Task
    from common.vision.datasets import ImageDataset
    from competitions.inclusive_images.label_embedding import LabelEmbedding
    from competitions.inclusive_images.rows import Rows

SOURCE = Source(
    slug="inclusive-images-challenge",
    expected=(
        "train_human_labels.csv",
        "classes-trainable.csv",
        "class-descriptions.csv",
        "tuning_labels.csv",
        "stage_1_sample_submission.csv",
        "train_images/*.jpg",
        "stage_1_test_images/*",
    ),
    higher_is_better=True,
    sample_submission="stage_*_sample_submission.csv",
    labels=("train_human_labels.csv", "classes-trainable.csv", "class-descriptions.csv", "tuning_labels.csv"),
    images=Images(
        url="https://open-images-dataset.s3.amazonaws.com/train/{id}.jpg",
        ids_file="train_human_labels.csv",
        ids_column="ImageID",
        folder="train_images",
        total="1,743,042 images, 525 GB",
    ),
    notes="the training images are not on Kaggle: they come from Open Images, and a part of them is enough to train on",
)


@dataclass(frozen=True)
class TagConfig(Config):
    """The settings of inclusive_images: the rows, the network and its heads, their losses, the label vectors."""

    stage: Literal["1", "2"] = flag("1", "test images and sample submission of this stage", predicts=True)
    labelled: Literal["train", "validated", "both", "tuning"] = flag(
        "train",
        "rows: the training images in folds; all of them, validated on the tuning images (fold 0); both, the tuning "
        "images in folds; or the tuning images alone, in folds",
    )
    start_from: str = flag("", "finished run whose weights to start from; heads that are absent here are dropped")
    learns: Literal["all", "heads"] = flag("all", "what is trained; heads leaves the backbone as it is")
    size: tuple[int, int] = flag((224, 224), "height and width of the images", "pixels", at_least(32))
    cache_gb: float = flag(
        20.0, "resized images are kept in one file up to this size; 0 decodes every time", "GB", at_least(0)
    )
    backbone: str = flag("resnet50", "model of timm")
    encoder_weights: str = flag(
        "none", "where the backbone starts: none, as the competition forbade others, imagenet, or a file of weights"
    )
    dropout: float = flag(0.2, "part of the pooled features that the heads do without in training", rule=between(0, 1))
    augment: Literal["none", "light", "heavy"] = flag("heavy", "changes of the training images")
    mix: Literal["none", "mixup", "cutmix"] = flag("none", "blend pairs of training images and their labels")
    sampling: Literal["shuffled", "weighted"] = flag("shuffled", "every image once an epoch, or rare labels more often")
    classifier: float = flag(1.0, "weight of the classifier's loss; 0 leaves the head out", rule=at_least(0))
    loss: Literal["bce", "focal", "f2", "bce+f2", "pvn"] = flag(
        "f2", "of the classifier; f2 is the soft F2 of each image, pvn a softmax of each positive against all negatives"
    )
    embedding: float = flag(0.0, "weight of the embedding head's loss; 0 leaves the head out", rule=at_least(0))
    embedding_loss: Literal["cosine", "mse"] = flag("cosine", "distance to the sum of the label vectors")
    embedding_dim: int = flag(512, "length of a label vector", rule=at_least(1))
    embedding_kind: Literal["ppmi", "pmi"] = flag("ppmi", "what the label vectors factor; pmi is the blog's matrix")
    smoothing: float = flag(3.0, "imagined images added to every pair of labels", "images", at_least(0))
    count: float = flag(
        0.0,
        "weight of the loss of the number of labels, which only helps the training; 0 leaves the head out",
        rule=at_least(0),
    )
    clusters: int = flag(
        0, "clusters of labels of which at most one to three are kept; 0 never trims", "clusters", at_least(0)
    )


DEFAULT = TagConfig(
    epochs=25, batch_size=128, optimizer="sgd", lr=0.05, weight_decay=1e-4, warmup=0.05, ema=0.999, embedding=0.1
)
SMALL = replace(
    DEFAULT,
    labelled="validated",
    epochs=10,
    batch_size=64,
    optimizer="adamw",
    lr=2e-3,
    weight_decay=0.05,
    ema=0.995,
    keep="last",
    size=(64, 96),
    loss="bce",
    backbone="resnet10t",
    augment="light",
    embedding_dim=128,
    channels_last=True,
    evaluate_every=4,
)
RECIPES: dict[str, TagConfig] = {
    # make train COMP=inclusive_images: both heads of a ResNet-50 from scratch, days on one card for all images
    "default": DEFAULT,
    # ... RECIPE=classifier ARGS="--start-from RUN": then without the embedding head, a fifth of the passes
    "classifier": replace(DEFAULT, embedding=0.0, epochs=5, lr=0.005),
    # ... RECIPE=tuned ARGS="--start-from RUN": the heads on four fifths of the tuning images, scored on the rest
    "tuned": replace(
        DEFAULT,
        labelled="tuning",
        learns="heads",
        embedding=0.0,
        optimizer="adamw",
        epochs=20,
        lr=1e-4,
        ema=0.0,
        keep="last",
        evaluate_every=5,
    ),
    # RECIPE=small: a few thousand small photographs on a CPU. Three networks, each of which leaves out a third of the
    # tuning images, so that the rule is learnt on all of those by networks that have not seen them
    "small": replace(SMALL, labelled="both", fold="all", folds=3, epochs=16, embedding=2.0, mix="mixup"),
    # what it is made of, one network each, for comparison at equal budget
    "small-both": replace(SMALL, embedding=2.0),
    "small-bce": replace(SMALL, embedding=0.0),
    "small-f2": replace(SMALL, embedding=0.0, loss="f2"),
    "small-embedding": replace(SMALL, classifier=0.0, embedding=1.0),
    "small-classifier": replace(SMALL, embedding=0.0, epochs=10, lr=5e-4),
    "small-tuned": replace(
        SMALL,
        labelled="tuning",
        learns="heads",
        embedding=0.0,
        epochs=20,
        lr=1e-4,
        ema=0.0,
        evaluate_every=5,
        augment="none",
    ),
    # RECIPE=smoke: seconds on the demo data, to see that everything works
    "smoke": replace(
        SMALL,
        labelled="train",
        epochs=2,
        batch_size=32,
        ema=0.9,
        size=(64, 64),
        backbone="resnet10t",
        embedding=0.3,
        embedding_dim=16,
        count=0.01,
        clusters=16,
        mix="mixup",
        evaluate_every=1,
        channels_last=False,
    ),
}


def write_demo(folder: Path) -> None:
    """A few hundred generated scenes in the competition's files."""
    from competitions.inclusive_images import demo

    demo.write(folder)


def build(config: TagConfig, raw: RawData) -> Task:
    """Read and check the files, fit the label vectors and put the competition together; raises UserError."""
    import numpy as np

    from common.task import Task, View
    from common.vision.datasets import ImageDataset
    from common.vision.store import ImageStore
    from common.vision.tta import MIRRORED
    from competitions.inclusive_images import decision, rows
    from competitions.inclusive_images.dataset import Targets, augmentation, sampling_weights

    _check(config)
    announce = print if os.environ.get("RANK", "0") == "0" else _silent
    files = rows.read(config, raw, announce)
    embedding = rows.embed(config, files) if config.embedding or config.clusters else None
    m = len(files.index)
    projections = np.zeros((m, config.embedding_dim if embedding else 1), np.float32)
    if embedding:
        projections[embedding.known] = embedding.projections
    clusters = decision.cluster(embedding, config.clusters) if config.clusters else np.arange(m)
    counts = np.asarray(files.fitted.sum(axis=0, dtype=np.int64)).ravel()
    prior = np.argsort(-counts, kind="stable")[: min(3, m)]
    default = decision.Rule("expected") if config.classifier else decision.Rule("threshold", 0.0, 5, 5)

    store = partial(ImageStore, size=config.size, cache=raw.cache, limit_gb=config.cache_gb, announce=announce)
    images, test = store(files.paths), ImageDataset(store(files.test_paths))
    vectors = embedding.vectors if config.embedding else None
    weights = sampling_weights(files.labels) if config.sampling == "weighted" else None

    def learn(scores: Any, held: Any) -> dict[str, Any]:
        trims = (0, 1, 2, 3) if config.clusters else (0,)
        return decision.learn(scores, files.labels[held], prior, clusters, trims, config.seed)

    def decide(scores: Any, learnt: dict[str, Any]) -> Any:
        return decision.decide(scores, learnt, default, prior, clusters)

    def lines(ids: Sequence[str], decisions: Any) -> list[tuple[str, str]]:
        found = decisions["labels"].cpu().numpy()
        return [(image, files.index.text(np.flatnonzero(row))) for image, row in zip(ids, found, strict=True)]

    network = partial(_model, config, m, projections, counts / files.fitted.shape[0])
    targets = Targets(files.labels, vectors, config.count > 0)
    return Task(
        labelled=ImageDataset(images, targets, transform=augmentation(config.augment, config.size)),
        plain=ImageDataset(images, targets),
        test=test,
        ids=files.ids,
        test_ids=files.test_ids,
        folds=files.folds,
        model=network,
        loss=_loss(config),
        metrics=_metrics(),
        predict=partial(_predict, config),
        decide=decide,
        columns=("image_id", "labels"),
        rows=lines,
        sample_submission=lambda: raw.text(files.sample_name).splitlines(),
        valid=partial(_fault, files.index.column),
        learn=learn,
        preflight=partial(_preflight, network, test),
        pretrain=partial(_pretrain, config, files) if config.start_from or config.encoder_weights != "none" else None,
        views=tuple(View(name, way.apply) for name, way in MIRRORED.items()),
        order=None if weights is None else partial(_weighted, weights),
        mix=_mix(config.mix),
        fingerprint=files.fingerprint,
        outputs=str(files.index),
        paths=[*files.paths, *files.test_paths],
        prediction_type="float16",
        report=partial(_report, config, files, embedding, decide),
    )


def _silent(message: str) -> None:
    """Only the first process speaks."""


def _weighted(weights: Any, training_rows: Any) -> Any:
    from common.loading.orders import weighted

    return weighted(weights[training_rows], rows=training_rows)


def _mix(kind: str) -> Any:
    """Half of the pairs are blended: few photographs are learnt by heart within some twenty epochs otherwise."""
    from common.loading.mixing import CutMix, MixUp

    return {"none": None, "mixup": MixUp(alpha=1.0, probability=0.5), "cutmix": CutMix(probability=0.5)}[kind]


def _check(config: TagConfig) -> None:
    if not (config.classifier or config.embedding):
        raise UserError("--classifier 0 --embedding 0 leaves nothing that predicts labels: give one of them a weight")
    if config.learns == "heads" and not config.start_from:
        raise UserError("--learns heads trains on a backbone of random weights: add --start-from RUN")
    if config.labelled == "validated" and config.fold not in ("0", "none"):
        raise UserError(f"--fold {config.fold} --labelled validated: the tuning images are fold 0, expected 0 or none")


def _preflight(network: Callable[[], Any], test: ImageDataset) -> None:
    """Raises UserError when there is no such network, or when the test images cannot make a submission at the end."""
    from common.vision.check import refuse_unreadable

    network()
    refuse_unreadable(test.unreadable(), len(test), "test images")


def _pretrain(config: TagConfig, files: Rows, network: Any) -> None:
    from common.vision.weights import start_backbone
    from competitions.inclusive_images import rows

    if config.start_from:
        rows.start_from(config, files, network)
    else:
        start_backbone(network.backbone, config.backbone, config.encoder_weights)


def _model(config: TagConfig, m: int, projections: Any, rates: Any) -> Any:
    from competitions.inclusive_images.model import HEADS, TagNet

    weights = dict(zip(HEADS, (config.classifier, config.embedding, config.count), strict=True))
    heads = tuple(name for name in HEADS if weights[name])
    return TagNet(config.backbone, config.size, m, heads, projections, rates, config.dropout, config.learns == "heads")


def _loss(config: TagConfig) -> Any:
    from common.losses import BCE, MSE, CosineProximity, Focal, Heads, PositivesVersusNegatives, SoftFBeta, Weighted

    f2 = SoftFBeta(beta=2, average="samples", smooth=0.1)
    # The mean of 7,178 entries is tiny beside the other losses: both are given as sums over about a hundred labels.
    labels = {
        "bce": Weighted((BCE(), 100.0)),
        "focal": Weighted((Focal(gamma=2, alpha=0.25), 100.0)),
        "f2": f2,
        "bce+f2": Weighted((BCE(), 20.0), (f2, 1.0)),
        "pvn": PositivesVersusNegatives(),
    }[config.loss]
    embedding = {"cosine": CosineProximity(), "mse": MSE()}[config.embedding_loss]
    heads = {
        "labels": (labels, config.classifier),
        "embedding": (embedding, config.embedding),
        "count": (MSE(), config.count),
    }
    return Heads({name: part for name, part in heads.items() if part[1]})


def _predict(config: TagConfig, outputs: Any) -> Any:
    """Scores [B, m] of 0 to 1."""
    from competitions.inclusive_images.decision import against_negatives

    logits = outputs["labels"]
    return against_negatives(logits) if config.classifier and config.loss == "pvn" else logits.sigmoid()


def _metrics() -> tuple[Metric, ...]:
    from common.task import Metric
    from competitions.inclusive_images.decision import f2

    def precision(decisions: Any, targets: Any) -> Any:
        return targets["labels"].gather(1, decisions["best"]).double().mean(1)

    return Metric("f2", lambda decisions, targets: f2(decisions["labels"], targets["labels"])), Metric(
        "precision_at_5", precision
    )


def _fault(trainable: dict[str, int], values: Sequence[str]) -> str | None:
    codes = values[0].split()
    if not codes:
        return "no label, which scores 0"
    unknown = [code for code in codes if code not in trainable]
    if unknown:
        return f"{unknown[0]} is not in classes-trainable.csv"
    return "a label is there twice" if len(set(codes)) < len(codes) else None


def _report(config: TagConfig, files: Rows, embedding: LabelEmbedding | None, decide: Any, run: Run) -> None:
    """The page of a run. What trained without label vectors gets some for its plots, where the labels have any."""
    from competitions.inclusive_images import plots, rows

    if embedding is None:
        try:
            embedding = rows.embed(config, files)
        except UserError as error:
            run.log(f"no plots of the label vectors: {error}")
    plots.report(run, files, embedding, decide)
