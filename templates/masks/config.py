"""Settings of my_competition: its place on Kaggle, its flags, its recipes. Imports nothing heavy."""

from dataclasses import dataclass, replace

from common.config import Config, at_least, between, flag
from common.flags import cache_flag
from common.kaggle.source import Source

SOURCE = Source(  # CHANGE: for make data, submit, board and kernel
    slug="my-competition",  # as in https://www.kaggle.com/c/my-competition
    expected=("train.csv", "sample_submission.csv", "train/*.png", "test/*.png"),
    higher_is_better=True,
)


@dataclass(frozen=True)
class MyConfig(Config):
    """Each field is a flag: make train COMP=my_competition ARGS="--size 512,512". Common flags: common/config.py."""

    size: tuple[int, int] = flag((256, 256), "height and width of the network's input", "pixels", at_least(32))
    cache_gb: float = cache_flag()
    encoder: str = flag("resnet34", "encoder of segmentation-models-pytorch, or tu- and a model of timm")
    encoder_weights: str = flag("imagenet", "its start: imagenet, none, or a file of weights", names="weights")
    threshold: float = flag(0.5, "probability from which a pixel is set", rule=between(0, 1), predicts=True)


DEFAULT = MyConfig(epochs=20, batch_size=16, lr=1e-3, ema=0.99)
DEMO = replace(  # trains on the generated images in a minute
    DEFAULT, size=(64, 64), encoder="tu-test_resnet", encoder_weights="none", epochs=20, batch_size=8, lr=3e-3, ema=0.9
)
RECIPES = {
    "default": DEFAULT,
    "best": replace(DEFAULT, fold="all", size=(512, 512), encoder="efficientnet-b3"),  # CHANGE: your best
    "demo": DEMO,
    "smoke": replace(DEMO, epochs=1, ema=0.0, precision="fp32"),
}
