"""Settings of Digit Recognizer: the flags, the recipes and the source of the data."""

from dataclasses import dataclass, replace

from common.config import Config, at_least, between, flag
from common.kaggle.source import Source

SOURCE = Source(
    slug="digit-recognizer",
    expected=("train.csv", "test.csv", "sample_submission.csv"),
    higher_is_better=True,
    labels=("train.csv",),
)


@dataclass(frozen=True)
class DigitConfig(Config):
    """The settings of Digit Recognizer: the network's size and the strength of the augmentation."""

    width: int = flag(
        32, "channels of the first stage; the next ones have 2 and 4 times as many", "channels", at_least(1)
    )
    kernel: int = flag(5, "side of the larger convolutions", "pixels", (lambda side: side % 2 == 1, "an odd number"))
    dropout: float = flag(0.0, "dropout rate of the last features", rule=between(0, 1))
    rotation: float = flag(12.0, "largest rotation of a training image", "degrees", at_least(0))
    scale: float = flag(0.12, "largest scaling of width and of height", "log of the factor", at_least(0))
    shear: float = flag(0.12, "largest slant", "pixels per pixel of height", at_least(0))
    shift: float = flag(2.0, "largest shift to each side", "pixels", at_least(0))
    elastic: float = flag(0.8, "standard deviation of the elastic bending", "pixels", at_least(0))


# Training times and scores of the recipes are in README.md.
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
    tta=False,
    rotation=8.0,
    scale=0.08,
    shear=0.08,
    shift=1.0,
    elastic=0.4,
)
# make train COMP=digit_recognizer RECIPE=best
RECIPES["best"] = replace(RECIPES["default"], fold="all")
# make train COMP=digit_recognizer without data
RECIPES["demo"] = replace(RECIPES["default"], epochs=12)
# seconds on the demo data, for tests
RECIPES["smoke"] = replace(RECIPES["default"], width=8, epochs=2, folds=5, precision="fp32", evaluate_every=1, ema=0.9)
