"""Settings of inclusive_images: the flags, the recipes and the source of the data."""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import Config, at_least, between, flag
from common.flags import cache_flag
from common.kaggle.source import Images, Source

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
    rows: Literal["train", "validated", "both", "tuning"] = flag(
        "train",
        "folds of the training images; all of them, validated on the tuning images (fold 0); both, in folds of the "
        "tuning images; or folds of the tuning images alone",
    )
    start_from: str = flag(
        "", "finished run to take the initial weights from; its heads that are not used here are dropped", names="runs"
    )
    trains: Literal["all", "heads"] = flag("all", "what is trained; heads keeps the backbone frozen")
    size: tuple[int, int] = flag((224, 224), "height and width of the images", "pixels", at_least(32))
    detail: float = flag(
        1.0, "images are kept this much larger than --size, so that crops keep their detail", "times", at_least(1)
    )
    cache_gb: float = cache_flag()
    backbone: str = flag("resnet50", "model of timm")
    encoder_weights: str = flag(
        "none",
        "where the backbone starts: none, as the competition forbade others, imagenet, or a file of weights",
        names="weights",
    )
    dropout: float = flag(0.2, "dropout rate of the heads' input, the pooled features", rule=between(0, 1))
    augment: Literal["none", "light", "heavy"] = flag("heavy", "augmentation of the training images")
    mix: Literal["none", "mixup", "cutmix", "both"] = flag(
        "none", "blend half of the training images, and labels, with another; both: four fifths, by mixup or cutmix"
    )
    sampling: Literal["shuffled", "weighted"] = flag("shuffled", "every image once an epoch, or rare labels more often")
    classifier: float = flag(1.0, "weight of the classifier's loss; 0 leaves the head out", rule=at_least(0))
    loss: Literal["bce", "focal", "f2", "bce+f2", "pvn"] = flag(
        "f2", "the classifier's loss; f2: soft F2 of each image; pvn: softmax of each positive against all negatives"
    )
    embedding: float = flag(0.0, "weight of the embedding head's loss; 0 leaves the head out", rule=at_least(0))
    embedding_loss: Literal["cosine", "mse"] = flag("cosine", "distance to the sum of the image's label vectors")
    embedding_dim: int = flag(512, "length of a label vector", rule=at_least(1))
    embedding_kind: Literal["ppmi", "pmi"] = flag(
        "ppmi", "matrix that is factored into label vectors; pmi is the blog's"
    )
    smoothing: float = flag(3.0, "pseudo-count of images added to every pair of labels", "images", at_least(0))
    count: float = flag(
        0.0,
        "loss weight of the head that counts labels, an auxiliary task; 0 leaves the head out",
        rule=at_least(0),
    )
    clusters: int = flag(
        0,
        "clusters of labels; an image keeps at most one to three of each, as tuned; 0: no limit",
        "clusters",
        at_least(0),
    )

    @property
    def heads(self) -> dict[str, float]:
        """The heads that the network has, with the weights of their losses."""
        weights = {"labels": self.classifier, "embedding": self.embedding, "count": self.count}
        return {name: weight for name, weight in weights.items() if weight}


DEFAULT = TagConfig(
    epochs=25, batch_size=128, optimizer="sgd", lr=0.05, weight_decay=1e-4, warmup=0.05, ema=0.999, embedding=0.1
)
SMALL = replace(
    DEFAULT,
    rows="validated",
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
    # make train COMP=inclusive_images: ResNet-50 with both heads from scratch; all images take days on one GPU
    "default": DEFAULT,
    # RECIPE=classifier ARGS="--start-from RUN": goes on without the embedding head, for a fifth of the epochs
    "classifier": replace(DEFAULT, embedding=0.0, epochs=5, lr=0.005),
    # RECIPE=tuned ARGS="--start-from RUN": trains the heads on four fifths of the tuning images, scores on the rest
    "tuned": replace(
        DEFAULT,
        rows="tuning",
        trains="heads",
        embedding=0.0,
        optimizer="adamw",
        epochs=20,
        lr=1e-4,
        ema=0.0,
        keep="last",
        evaluate_every=5,
    ),
    # RECIPE=small: a few thousand small photographs on a CPU. Three networks, each leaving out a third of the tuning
    # images, give out-of-fold predictions of all tuning images to tune the rule on
    "small": replace(
        SMALL,
        backbone="ese_vovnet19b_slim",
        rows="both",
        fold="all",
        folds=3,
        epochs=32,
        embedding=2.0,
        mix="both",
        detail=2.0,
    ),
    # the parts of `small`, one ResNet-10 each, for a comparison at equal budget
    "small-both": replace(SMALL, embedding=2.0),
    "small-bce": replace(SMALL, embedding=0.0),
    "small-f2": replace(SMALL, embedding=0.0, loss="f2"),
    "small-embedding": replace(SMALL, classifier=0.0, embedding=1.0),
    "small-classifier": replace(SMALL, embedding=0.0, lr=5e-4),
    "small-tuned": replace(
        SMALL,
        rows="tuning",
        trains="heads",
        embedding=0.0,
        epochs=20,
        lr=1e-4,
        ema=0.0,
        evaluate_every=5,
        augment="none",
    ),
    # make train COMP=inclusive_images without data: a laptop's CPU, generated scenes
    "demo": replace(SMALL, rows="train", epochs=12, batch_size=32, size=(64, 64), embedding=0.3, embedding_dim=16),
    # RECIPE=smoke: seconds on the demo data, to check that everything works
    "smoke": replace(
        SMALL,
        rows="train",
        epochs=2,
        batch_size=32,
        ema=0.9,
        size=(64, 64),
        embedding=0.3,
        embedding_dim=16,
        count=0.01,
        clusters=16,
        mix="mixup",
        evaluate_every=1,
        channels_last=False,
    ),
}
