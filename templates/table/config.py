"""Settings of my_competition: its place on Kaggle, its flags, its recipes. Imports nothing heavy."""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import Config, at_least, between, flag
from common.kaggle.source import Source

SOURCE = Source(  # CHANGE: for make data, submit, board and kernel
    slug="my-competition",  # as in https://www.kaggle.com/c/my-competition
    expected=("train.csv", "test.csv", "sample_submission.csv"),
    higher_is_better=False,
)


@dataclass(frozen=True)
class MyConfig(Config):
    """Each field is a flag: make train COMP=my_competition ARGS="--width 512". Common flags: common/config.py."""

    model: Literal["network", "boosting"] = flag("network", "a small network, or LightGBM")
    width: int = flag(256, "units of a hidden layer of the network", rule=at_least(1))
    dropout: float = flag(0.1, "dropout rate of a hidden layer", rule=between(0, 1))
    trees: int = flag(500, "trees of LightGBM", rule=at_least(1))
    leaves: int = flag(31, "leaves of a tree", rule=at_least(2))
    tree_lr: float = flag(0.05, "learning rate of LightGBM", rule=between(0, 1))


DEFAULT = MyConfig(fold="all", epochs=30, batch_size=256, lr=1e-3, workers=0)
DEMO = replace(DEFAULT, batch_size=64)  # trains on the generated table in seconds
RECIPES = {
    "default": DEFAULT,
    "boosting": replace(DEFAULT, model="boosting"),
    "demo": DEMO,
    "smoke": replace(DEMO, fold="0", epochs=2, width=32, trees=20, precision="fp32"),
}
