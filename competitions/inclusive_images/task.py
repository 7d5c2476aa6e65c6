"""Inclusive Images: predict which of 7,178 labels a photograph has; the score is the mean F2 over images.

make train COMP=inclusive_images RECIPE=small
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from common.errors import UserError
from common.loading import orders
from common.loading.mixing import CutMix, MixUp, OneOf
from common.losses import BCE, MSE, CosineProximity, Focal, Heads, PositivesVersusNegatives, SoftFBeta, Weighted
from common.metrics import Metric, f_beta
from common.raw import RawData
from common.report import Report
from common.run import Run
from common.task import TTA, Data, Network, Postprocess, Submission, Task
from common.vision.datasets import ImageDataset
from common.vision.store import ImageStore
from common.vision.tta import MIRRORED
from common.vision.weights import start_backbone
from competitions.inclusive_images import decision, plots, rows
from competitions.inclusive_images.config import TagConfig
from competitions.inclusive_images.dataset import SoftTargets, Targets, augmentation, resized
from competitions.inclusive_images.label_embedding import LabelEmbedding
from competitions.inclusive_images.model import TagNet
from competitions.inclusive_images.rows import Rows


def build(config: TagConfig, raw: RawData, log: Callable[[str], Any]) -> Task:
    """Read and check the files, fit the label vectors, build the Task; raises UserError for wrong settings or files."""
    _check(config)
    files = rows.read(config, raw, log)
    embedding = rows.embed(config, files) if config.embedding or config.clusters else None
    clusters = decision.cluster(embedding, config.clusters) if config.clusters else np.arange(len(files.index))
    default = decision.Rule("expected") if config.classifier else decision.Rule("threshold", 0.0, 5, 5)
    prior = np.argsort(-files.counts, kind="stable")[:3]  # the most frequent labels, for images that get no other one
    decide = partial(decision.apply, default=default, prior=prior, clusters=clusters)
    kept = tuple(round(side * config.detail) for side in config.size)
    store = partial(ImageStore.beside, raw, size=kept, limit_gb=config.cache_gb, announce=log)
    images, test = store(files.paths), store(files.test_paths)
    vectors = embedding.vectors if config.embedding else None
    weights = orders.by_rarity(files.labels) if config.sampling == "weighted" else None
    targets = Targets(files.labels, vectors, config.count > 0)
    whole = resized(config.size) if kept != config.size else None
    augment = augmentation(config.augment, config.size, larger=whole is not None) or whole

    def tune(scores: np.ndarray, held: np.ndarray) -> dict[str, Any]:
        trims = (0, 1, 2, 3) if config.clusters else (0,)
        return decision.tune(scores, files.labels[held], prior, clusters, trims, default, config.seed)

    def lines(ids: Sequence[str], decisions: dict[str, Tensor]) -> list[tuple[str, str]]:
        found = decisions["labels"].cpu().numpy()
        return [(image, files.index.text(np.flatnonzero(row))) for image, row in zip(ids, found, strict=True)]

    return Task(
        data=Data(
            train=ImageDataset(images, targets, transform=augment),
            valid=ImageDataset(images, targets, transform=whole),
            ids=files.ids,
            folds=files.folds,
            test=ImageDataset(test, transform=whole),
            order=None if weights is None else lambda own: orders.weighted(weights[own], rows=own),
            mix=_mix(config.mix),
            pseudo=lambda scores: ImageDataset(test, SoftTargets(scores, vectors, config.count > 0), transform=augment),
        ),
        network=Network(
            model=partial(_model, config, files, embedding),
            loss=_loss(config),
            tta=tuple(TTA(name, way.apply) for name, way in MIRRORED.items()),
            pretrain=partial(_pretrain, config, files),
            outputs=str(files.index),
        ),
        postprocess=Postprocess(predict=partial(_predict, config), apply=decide, tune=tune, kept="float16"),
        submission=Submission(rows=lines, valid=partial(_fault, files.index.column), sample=files.sample_name),
        metrics=_metrics(),
        report=partial(_report, config, files, embedding, decide),
    )


def _mix(kind: str) -> Any:
    """Blend half of the pairs, or four fifths with "both", because a network soon overfits on few photographs."""
    return {
        "none": None,
        "mixup": MixUp(alpha=1.0, probability=0.5),
        "cutmix": CutMix(probability=0.5),
        "both": OneOf(MixUp(alpha=1.0, probability=0.8), CutMix(probability=0.8)),
    }[kind]


def _check(config: TagConfig) -> None:
    if not (config.classifier or config.embedding):
        raise UserError("--classifier 0 --embedding 0 leaves nothing that predicts labels: give one of them a weight")
    if config.trains == "heads" and not config.start_from:
        raise UserError("--trains heads trains on a backbone of random weights: add --start-from RUN")
    if config.rows == "validated" and config.fold not in ("0", "none"):
        raise UserError(f"--fold {config.fold} --rows validated: the tuning images are fold 0, expected 0 or none")


def _model(config: TagConfig, files: Rows, embedding: LabelEmbedding | None) -> TagNet:
    m = len(files.index)
    projections = np.zeros((m, config.embedding_dim if embedding else 1), np.float32)
    if embedding:
        projections[embedding.known] = embedding.projections
    rates, frozen = files.counts / files.fitted.shape[0], config.trains == "heads"
    return TagNet(config.backbone, config.size, m, tuple(config.heads), projections, rates, config.dropout, frozen)


def _pretrain(config: TagConfig, files: Rows, network: TagNet) -> str | None:
    if config.start_from:
        return rows.start_from(config, files, network)
    return start_backbone(network.backbone, config.backbone, config.encoder_weights)


def _loss(config: TagConfig) -> Any:
    f2 = SoftFBeta(beta=2, average="samples", smooth=0.1)
    # The mean over 7,178 entries is tiny beside the other losses, so BCE and Focal get weights of 20 to 100.
    labels = {
        "bce": Weighted((BCE(), 100.0)),
        "focal": Weighted((Focal(gamma=2, alpha=0.25), 100.0)),
        "f2": f2,
        "bce+f2": Weighted((BCE(), 20.0), (f2, 1.0)),
        "pvn": PositivesVersusNegatives(),
    }[config.loss]
    embedding = {"cosine": CosineProximity(), "mse": MSE()}[config.embedding_loss]
    losses = {"labels": labels, "embedding": embedding, "count": MSE()}
    return Heads({name: (losses[name], weight) for name, weight in config.heads.items()})


def _predict(config: TagConfig, outputs: dict[str, Tensor]) -> Tensor:
    """Scores [B, m] from 0 to 1."""
    logits = outputs["labels"]
    return decision.against_negatives(logits) if config.classifier and config.loss == "pvn" else logits.sigmoid()


def _metrics() -> tuple[Metric, ...]:
    def precision(decisions: Any, targets: Any) -> Any:
        return targets["labels"].gather(1, decisions["best"]).double().mean(1)

    f2 = f_beta(2, "samples").on(lambda decisions, targets: (decisions["labels"], targets["labels"]), "f2")
    return f2, Metric("precision_at_5", precision)


def _fault(trainable: dict[str, int], values: Sequence[str]) -> str | None:
    codes = values[0].split()
    if not codes:
        return "no label, which scores 0"
    unknown = [code for code in codes if code not in trainable]
    if unknown:
        return f"{unknown[0]} is not in classes-trainable.csv"
    return "a label appears twice" if len(set(codes)) < len(codes) else None


def _report(
    config: TagConfig, files: Rows, embedding: LabelEmbedding | None, decide: Any, run: Run, page: Report
) -> None:
    """The report of a run. For a run without label vectors they are fitted for the plots, if the labels allow it."""
    if embedding is None:
        try:
            embedding = rows.embed(config, files)
        except UserError as error:
            run.log(f"no plots of the label vectors: {error}")
    plots.report(run, page, files, embedding, decide)
