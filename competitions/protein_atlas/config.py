"""Settings of protein_atlas: the flags, the recipes and the source of the data."""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import Config, at_least, between, flag
from common.flags import cache_flag
from common.kaggle.source import Source

SOURCE = Source(
    slug="human-protein-atlas-image-classification",
    expected=("train.csv", "sample_submission.csv", "train/*", "test/*"),
    higher_is_better=True,
    labels=("train.csv", "sample_submission.csv"),
    notes="18 GB: 31,072 training and 11,702 test images, four PNGs of 512x512 each",
)
Loss = Literal["bce", "focal", "soft_f1", "soft_f1_samples", "soft_f1_both", "focal+soft_f1", "lovasz"]


@dataclass(frozen=True)
class ProteinConfig(Config):
    """The settings of protein_atlas: the network, its input size, its losses, and the choice of thresholds."""

    size: tuple[int, int] = flag((256, 256), "height and width of the network's input", "pixels", at_least(32))
    cache_gb: float = cache_flag()
    backbone: str = flag("resnet34", "model of timm")
    encoder_weights: str = flag(
        "imagenet", "where the backbone starts: imagenet, none, or a file of weights", names="weights"
    )
    yellow: Literal["mean", "red", "green", "blue"] = flag(
        "mean", "initial weights of the fourth channel: the mean of the other three, or a copy of one"
    )
    dropout: float = flag(0.25, "dropout rate of the head's input, the pooled features", rule=between(0, 1))
    augment: Literal["none", "light", "strong"] = flag("light", "augmentation of the training images")
    sampling: Literal["shuffled", "weighted"] = flag("weighted", "every image once an epoch, or rare labels more often")
    loss: Loss = flag("bce", "soft_f1: per class over the whole batch; soft_f1_samples: per image; soft_f1_both: both")
    then: Literal["none", Loss] = flag("soft_f1", "the loss of the later epochs, from --then-from on")
    then_from: float = flag(0.5, "part of the epochs after which --then replaces --loss", "fraction", between(0, 1))
    alternate: bool = flag(False, "from --then-from on, --then and --loss take turns, epoch by epoch")
    thresholds: Literal["best", "matching", "half"] = flag(
        "best", "of each label: for the best out-of-fold F1, for its frequency in train.csv, or 0.5"
    )


DEFAULT = ProteinConfig(
    epochs=25, batch_size=64, lr=5e-4, weight_decay=1e-2, ema=0.998, keep="last", channels_last=True
)
SMALL = replace(DEFAULT, epochs=30, size=(128, 128), backbone="resnet18", encoder_weights="none", lr=2e-3, dropout=0.0)
DEMO = replace(
    SMALL, epochs=12, size=(64, 64), backbone="resnet10t", batch_size=32, lr=3e-3, ema=0.99, evaluate_every=2
)
RECIPES: dict[str, ProteinConfig] = {
    # make train COMP=protein_atlas: a GPU with 16 GB
    "default": DEFAULT,
    # RECIPE=full: full resolution, on a GPU with 16 GB or more; micro-batches as large as fit, steps over all 64 images
    "full": replace(
        DEFAULT, size=(512, 512), backbone="nasnetalarge", epochs=20, lr=3e-4, clip_norm=1.0, dropout=0.5, cache_gb=50.0
    ),
    # RECIPE=small: a laptop's CPU, from scratch
    "small": SMALL,
    # the recipe of make train on demo data: at most 90 s on two cores
    "demo": DEMO,
    # RECIPE=smoke: seconds on the demo data, to check that everything works
    "smoke": replace(DEMO, epochs=2, size=(32, 32), folds=3, alternate=True, precision="fp32", ema=0.9),
}
