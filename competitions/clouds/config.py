"""Settings of clouds: the flags, the recipes and the source of the data."""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import Config, at_least, between, flag
from common.flags import cache_flag
from common.kaggle.source import Source

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
    """The settings of clouds: the network, its input size, the augmentation and the parts of the loss."""

    size: tuple[int, int] = flag(
        (384, 576), "height and width of the network's input, up to 1400,2100", "pixels", at_least(64)
    )
    cache_gb: float = cache_flag()
    architecture: Architecture = flag("unet", "decoder of segmentation-models-pytorch")
    decoder_width: float = flag(1.0, "channels of the decoder", "times the default", between(0.1, 4))
    encoder: str = flag("resnet34", "encoder of segmentation-models-pytorch, or tu- and a timm name")
    encoder_weights: str = flag(
        "imagenet", "where the encoder starts: imagenet, none, or a file or folder of weights", names="weights"
    )
    encoder_lr: float = flag(0.3, "learning rate of the encoder", "times lr", at_least(0))
    class_head: Literal["pooled", "topk"] = flag(
        "pooled", "predict whether a class is there from the pooled deepest features, or from its ten likeliest pixels"
    )
    dropout: float = flag(0.2, "dropout rate of the class head's input, the deepest features", rule=between(0, 1))
    augment: Literal["none", "light", "strong"] = flag("light", "augmentation of the training images")
    blackout: float = flag(0.1, "share of training images with one class painted black", "fraction", between(0, 1))
    cutmix: float = flag(
        0.0, "share of training images with a box of another pasted in (CutMix)", "fraction", between(0, 1)
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
    epochs=44,
    size=(224, 336),
    architecture="fpn",
    decoder_width=0.5,
    encoder="tu-ese_vovnet19b_slim",
    encoder_weights="none",
    encoder_lr=1.0,
    augment="strong",
    cutmix=0.5,
    ema=0.995,
    channels_last=True,
    evaluate_every=22,
)
PRETRAINED = replace(
    SMALL,
    epochs=20,
    encoder="tu-tf_efficientnet_lite0",
    encoder_weights="imagenet",
    encoder_lr=0.3,
    cutmix=0.25,
    ema=0.99,
    evaluate_every=10,
)
DEMO = replace(SMALL, fold="0", encoder="resnet18", decoder_width=1.0)
FULL = replace(
    DEFAULT,
    epochs=15,
    batch_size=16,
    size=(1400, 2100),
    encoder="efficientnet-b3",
    micro_batch=1,  # "auto" would start with all sixteen, and on a CPU the process is killed when memory runs out
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
    # make train COMP=clouds: a GPU with 8 GB, some hours
    "default": DEFAULT,
    # make train COMP=clouds RECIPE=small: a laptop's CPU, 500 images
    "small": SMALL,
    # RECIPE=small-pretrained: the same from ImageNet weights; ARGS="--encoder-weights FILE" needs no network
    "small-pretrained": PRETRAINED,
    # make train COMP=clouds RECIPE=full: full resolution, on a GPU with 11 GB
    "full": FULL,
    # make train COMP=clouds RECIPE=best: five folds of a larger encoder, a day on one GPU
    "best": BEST,
    # make train COMP=clouds without data: a laptop's CPU, generated images
    "demo": replace(DEMO, epochs=30, batch_size=6, size=(96, 144), lr=2e-3, ema=0.97, cutmix=0.0, evaluate_every=3),
    # make train COMP=clouds RECIPE=smoke: seconds on the demo data, to check that everything works
    "smoke": replace(DEMO, folds=3, epochs=1, size=(64, 96), augment="light", precision="fp32", channels_last=False),
}
